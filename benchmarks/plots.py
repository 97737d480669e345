"""The figures of a run: one of attention, one of semantic guidance, one of reversible DDIM."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dense_attn._files import write_by

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
STYLE = {  # contender: (label, colour)
    "dense_attn": ("dense_attn", "#0b6e4f"),
    "sdpa": ("plain SDPA, no modulation", "#8d99ae"),
    "sdpa-bias": ("SDPA + bias in memory", "#e0a030"),
    "flex-smart": ("FlexAttention, two passes", "#5b8dd9"),
    "flex-naive": ("FlexAttention, three passes", "#2f5597"),
    "eager": ("official way, eager", "#c8553d"),
    "dense_attn-sorted": ("dense_attn, in order of region", "#2ea47a"),
    "dense_attn-no-lists": ("dense_attn, lists made in the call", "#78c9a9"),
    "dense_attn-gather": ("dense_attn, tokens copied into order", "#b5e0cd"),
    "sdpa-flash": ("SDPA, flash", "#6b7a90"),
    "sdpa-cudnn": ("SDPA, cuDNN", "#4d5a6d"),
    "sdpa-efficient": ("SDPA, memory-efficient", "#b8c2d0"),
    "sdpa-math": ("SDPA, math", "#d9dfe6"),
    "flash-attn": ("flash-attn", "#303a48"),
    "efficient-bias": ("memory-efficient + bias", "#f0c777"),
    "xformers": ("xformers + bias", "#b97a10"),
    "flash-channels": ("flash, bias as channels", "#9467bd"),
}

_PASSES = {"fwd": "Forward", "bwd": "Backward", "fwd+bwd": "Forward and backward"}


def files(path: Path) -> list[Path]:
    """The figures that `draw` may write."""
    return [path.with_stem(path.stem + suffix) for suffix in ("", "-sega", "-reversible")]


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """Write the figures of results as .png or .svg: attention's is `path`, others lie beside it."""
    from .reversible import plots as reversible
    from .sega import plots as sega

    written = []
    for file, drawing in zip(files(path), (attention, sega.figure, reversible.figure)):
        figure = drawing([row for row in results["rows"] if "reason" not in row])
        if figure is not None:
            figure.suptitle(_caption(results["header"]), fontsize=11)
            written.append(file)
            write_by(file, partial(figure.savefig, format=path.suffix[1:], dpi=110))
    return written


def attention(rows: list[Row]) -> Figure | None:
    """How many times longer others take, and how time and memory grow with the tokens; of a user's
    own shapes, every pass and dtype.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["family"] == "attention"]
    if not rows:
        return None
    own = any("own" in row for row in rows)
    if own:
        panels = list(dict.fromkeys((row["dtype"], row["pass"]) for row in rows if "ratio" in row))
    elif any(row["pass"] == "bwd" for row in rows):  # a GPU's
        panels = [("bfloat16", "fwd"), ("bfloat16", "bwd")]
    else:
        panels = [("float32", "fwd"), ("bfloat16", "fwd")]
    lines = not own or any(row["workload"].startswith("long") for row in rows)
    if not panels and not lines:
        return None
    heights = [1] * len(panels) + [1.15] * lines
    figure = Figure(figsize=(11, 3.65 * sum(heights)), layout="constrained")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for place, (dtype, passes) in enumerate(panels):
        ratios(figure.add_subplot(grid[place, :]), rows, dtype, passes)
    if lines:
        times, memory = (figure.add_subplot(grid[-1, column]) for column in (0, 1))
        scaling(times, rows, _time_per_head, "time of one head (ms)")
        scaling(memory, rows, _megabytes, "memory of a call beyond inputs and output (MB)")
    return figure


def ratios(axes: Axes, rows: list[Row], dtype: str, passes: str) -> None:
    """Bars of time over the library's, which is 1, for each workload of a model."""
    rows = [row for row in rows if (row["dtype"], row["pass"]) == (dtype, passes)]
    rows = [row for row in rows if "ratio" in row and not row["workload"].startswith("long")]
    names = list(dict.fromkeys(row["workload"] for row in rows))
    shown = [name for name in STYLE if any(row["contender"] == name for row in rows)]
    width = 0.84 / max(1, len(shown))
    for place, contender in enumerate(shown):
        mine = [row for row in rows if row["contender"] == contender]
        x = [names.index(row["workload"]) - 0.42 + (place + 0.5) * width for row in mine]
        label, colour = STYLE[contender]
        bars = axes.bar(x, [row["ratio"] for row in mine], width, label=label, color=colour)
        axes.bar_label(bars, [f"{row['ratio']:.1f}" for row in mine], fontsize=7, padding=1)
    axes.axhline(1, color=STYLE["dense_attn"][1], linewidth=2, label="dense_attn")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.margins(x=0.01)
    axes.set_ylim(top=3 * axes.get_ylim()[1])  # room for the legend
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set_ylabel("time / time of dense_attn")
    title = f"{_PASSES[passes]}, {dtype}: how many times longer than dense_attn"
    axes.set_title(title, fontsize=11)
    axes.legend(fontsize=8, ncols=6, columnspacing=1, handlelength=1.2, loc="upper center")


def scaling(axes: Axes, rows: list[Row], value: Callable[[Row], float | None], label: str) -> None:
    """A log-log line for each contender and dtype of the long self-attention."""
    rows = [row for row in rows if row["workload"].startswith("long") and row["pass"] == "fwd"]
    for contender, (name, colour) in STYLE.items():
        for dtype, line in (("float32", "-o"), ("bfloat16", "--s")):
            mine = [row for row in rows if (row["contender"], row["dtype"]) == (contender, dtype)]
            points = [(row["seqlen_q"], value(row)) for row in mine if value(row)]
            if points:
                axes.plot(*zip(*points), line, color=colour, markersize=4, label=f"{name}, {dtype}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1024:g}k")
    for name_ticks in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        name_ticks(lambda number, _: f"{number:g}" if f"{number:e}"[0] in "125" else "")
    axes.set_xlabel("tokens")
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)
    heads = {row["num_heads"] for row in rows}
    fewer = ", fewer above 4k" if len(heads) > 1 else ""
    title = f"Long self-attention, forward ({max(heads, default=8)} heads{fewer})"
    axes.set_title(title, fontsize=11)
    if axes.lines:
        axes.legend(fontsize=7)


def _time_per_head(row: Row) -> float:
    return 1e3 * row["seconds"] / (row["batch"] * row["num_heads"])


def _megabytes(row: Row) -> float | None:
    return row["peak_extra_bytes"] and row["peak_extra_bytes"] / 1e6


def _caption(header: dict[str, Any]) -> str:
    versions, torch = header["versions"], f"torch {header['versions']['torch']}"
    if "dry_run" in header:
        words = [header["device"], torch, f"Triton {versions['triton']}"]
    else:
        words = [header["device"], f"{header['threads']} threads"]
        words += [header["isa"] or header["torch_isa"], torch]
        words += [f"dense_attn {versions['dense_attn']}"]
    return ", ".join([*words, header["date"][:10]])
