"""The figure of reversible DDIM: step kernels, round trips, memory and time of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
_STEPS = {  # contender: (label, colour)
    "clone": ("x.clone(), into new memory", "#0b6e4f"),
    "copy": ("y.copy_(x), into memory in use", "#9ccfb9"),
}
_SAMPLERS = {  # sampler: title
    "edict": "EDICT, p = 0.93\n(at 1000 steps 0.99)",
    "bdia": "BDIA, gamma = 1\n",
    "belm": "O-BELM\n",
    "ddim": "DDIM, naive inversion\n",
}
_PRECISIONS = {  # dtype of the latents: (line, colour)
    "float16": ("-^", "#c8553d"),
    "float32": ("-s", "#e0a030"),
    "float64": ("-D", "#5b8dd9"),
    "exact": ("-o", "#0b6e4f"),
}
_GRADIENTS = {  # contender: (label, line, colour)
    "autograd": ("plain autograd", "-o", "#c8553d"),
    "checkpoint": ("a checkpoint each step", "-o", "#e0a030"),
    "dense_attn-float": ("dense_attn, float32", "--s", "#0b6e4f"),
    "dense_attn": ("dense_attn, exact", "-o", "#0b6e4f"),
}


def figure(rows: list[Row]) -> Figure | None:
    """A row of panels for each family that has rows; None without any."""
    from matplotlib.figure import Figure

    names = ("steps", "round_trip", "gradient")
    families = {name: [row for row in rows if row["family"] == name] for name in names}
    families = {name: found for name, found in families.items() if found}
    if not families:
        return None
    heights = [5.2 if name == "round_trip" else 3.9 for name in families]
    drawn = Figure(figsize=(11, 0.6 + sum(heights)), layout="constrained")
    grid = drawn.add_gridspec(len(families), 2, height_ratios=heights)
    for line, (name, found) in enumerate(families.items()):
        if name == "steps":
            _bandwidth(drawn.add_subplot(grid[line, :]), found)
        elif name == "round_trip":
            _errors(grid[line, :].subgridspec(1, len(_SAMPLERS)).subplots(sharey=True), found)
        else:
            memory, times = (drawn.add_subplot(grid[line, column]) for column in (0, 1))
            _growth(memory, found, "peak_extra_bytes", 1e-6, "memory beyond inputs (MB)")
            _growth(times, found, "seconds", 1, "time (s)")
    return drawn


def _bandwidth(axes: Axes, rows: list[Row]) -> None:
    """Bars of the step kernels' bytes per second over those of a copy of the same size."""
    rows = [row for row in rows if "of_copy" in row]
    names = list(dict.fromkeys(row["workload"] for row in rows))
    for place, (contender, (label, colour)) in enumerate(_STEPS.items()):
        mine = [row for row in rows if row["contender"] == contender]
        x = [names.index(row["workload"]) + 0.4 * (place - 0.5) for row in mine]
        bars = axes.bar(x, [row["of_copy"] for row in mine], 0.37, label=label, color=colour)
        axes.bar_label(bars, [f"{row['of_copy']:.2f}" for row in mine], fontsize=7, padding=1)
    axes.axhline(0.8, color="#444444", linewidth=1, linestyle="--", label="0.8")
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])  # room for the legend
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_xticks(range(len(names)), [_broken(name) for name in names], fontsize=6.5)
    axes.set_ylabel("bytes per second / those of a copy")
    title = "Step kernels, which write new memory: share of the speed of a copy of as many bytes"
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, ncols=3, loc="upper center")


def _broken(name: str) -> str:
    """A workload's name on two lines, its size below."""
    op, _, size = name.rpartition("-")
    return f"{op}\n{size}"


def _errors(panels: Sequence[Axes], rows: list[Row]) -> None:
    """Log-log lines of a round trip's largest error; zero, without logarithm, is at the bottom."""
    smallest = min((row["error"] for row in rows if row["error"] > 0), default=1e-16)
    zero = 10.0 ** (_exponent(smallest) - 2)
    steps = sorted({row["steps"] for row in rows})
    top = max(1.0, *(row["error"] for row in rows))
    powers = range(_exponent(smallest), _exponent(top) + 3, 3)
    ticks = [zero, *(10.0**power for power in powers)]
    panels[0].set_yscale("log")  # the axis is shared
    panels[0].set_ylim(zero / 5, 3 * ticks[-1])
    panels[0].set_yticks(ticks, ["0, every bit", *(f"1e{_exponent(tick):d}" for tick in ticks[1:])])
    panels[0].set_ylabel("noise to image to noise: largest error")
    for axes, (sampler, title) in zip(panels, _SAMPLERS.items()):
        for precision, (line, colour) in _PRECISIONS.items():
            mine = [row for row in rows if _is(row, sampler, precision)]
            found = {row["steps"]: row["error"] or zero for row in mine}
            # A gap where a chain left the dtype's range.
            y = [found.get(number, float("nan")) for number in steps]
            axes.plot(steps, y, line, color=colour, markersize=5, label=precision)
        axes.axhline(zero, color="#444444", linewidth=0.6)
        _step_axis(axes, rows)
        axes.set_title(title, fontsize=10)
    panels[-1].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1.0, 0.12))


def _is(row: Row, sampler: str, precision: str) -> bool:
    return (row["sampler"], row["dtype"]) == (sampler, precision)


def _exponent(value: float) -> int:
    """The power of ten at or below a value."""
    return int(f"{value * (1 + 1e-9):e}".partition("e")[2])


def _growth(axes: Axes, rows: list[Row], field: str, scale: float, label: str) -> None:
    """A log-log line against the number of steps for each way to the gradient."""
    for contender, (name, line, colour) in _GRADIENTS.items():
        mine = [row for row in rows if row["contender"] == contender and row.get(field)]
        if mine:
            x, y = [row["steps"] for row in mine], [scale * row[field] for row in mine]
            axes.plot(x, y, line, color=colour, markersize=5, label=name)
    _step_axis(axes, rows)
    axes.set_yscale("log")
    for name_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        name_ticks(lambda number, _: f"{number:g}" if f"{number:e}"[0] in "125" else "")
    axes.set_ylabel(label)
    axes.set_title(f"Gradient through EDICT: {label.partition(' (')[0]}", fontsize=11)
    if axes.lines:
        axes.legend(fontsize=8)


def _step_axis(axes: Axes, rows: list[Row]) -> None:
    steps = sorted({row["steps"] for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(steps, map(str, steps))
    axes.set_xticks([], minor=True)
    axes.set_xlabel("steps")
    axes.grid(alpha=0.3)
