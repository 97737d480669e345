"""The figure of percentiles and semantic guidance: how many times longer the others take."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = dict[str, Any]
OURS = "#0b6e4f"
STYLE = {  # (contender, dtype): (label, colour)
    ("torch.quantile", "float32"): ("torch.quantile, float32", "#2f5597"),
    ("torch.quantile", "bfloat16"): ("torch.quantile, bfloat16", "#8fb0e6"),
    ("torch.kthvalue", "float32"): ("torch.kthvalue twice, float32", "#b97a10"),
    ("torch.kthvalue", "bfloat16"): ("torch.kthvalue twice, bfloat16", "#f0c777"),
    ("diffusers", "float32"): ("diffusers' own step", "#c8553d"),
}


def figure(rows: list[Row]) -> Figure | None:
    """Bars of ratios, one panel a family; None without rows."""
    from matplotlib.figure import Figure

    titles = {
        "percentile": "Threshold and mask of the 90th percentile, exact in rows of any length",
        "sega": "One step of semantic guidance, all concepts warm, float32",
    }
    panels = {family: [row for row in rows if row["family"] == family] for family in titles}
    panels = {family: found for family, found in panels.items() if found}
    if not panels:
        return None
    drawn = Figure(figsize=(11, 1 + 3.6 * len(panels)), layout="constrained")
    places = drawn.subplots(len(panels), squeeze=False)[:, 0]
    for axes, (family, found) in zip(places, panels.items()):
        _ratios(axes, found)
        axes.set_title(titles[family], fontsize=11)
    return drawn


def _ratios(axes: Axes, rows: list[Row]) -> None:
    """Bars of time over the library's, which is 1 and whose time is noted, for each workload."""
    mine = [row for row in rows if row["contender"] == "dense_attn"]
    own = {(row["workload"], row["dtype"]): row["seconds"] for row in mine}
    rows = [row for row in rows if "ratio" in row]
    names = list(dict.fromkeys(row["workload"] for row in rows))
    shown = [key for key in STYLE if any((row["contender"], row["dtype"]) == key for row in rows)]
    width = 0.8 / max(2, len(shown))
    for place, key in enumerate(shown):
        mine = [row for row in rows if (row["contender"], row["dtype"]) == key]
        x = [names.index(row["workload"]) + (place + 0.5 - len(shown) / 2) * width for row in mine]
        label, colour = STYLE[key]
        ratios = [row["ratio"] for row in mine]
        bars = axes.bar(x, ratios, 0.94 * width, label=label, color=colour)
        axes.bar_label(bars, [_times(row["ratio"]) for row in mine], fontsize=8, padding=1)
    axes.axhline(1, color=OURS, linewidth=2, label="dense_attn")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.7), 4 * max(high, 1))  # room for the legend
    labels = [f"{name}\n{_time(own.get((name, 'float32')))}" for name in names]
    axes.set_xticks(range(len(names)), labels, fontsize=8)
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.set_ylabel("time / time of dense_attn")
    axes.legend(fontsize=8, ncols=5, columnspacing=1, handlelength=1.2, loc="upper center")


def _time(seconds: float | None) -> str:
    """The library's own time, below the name of a workload."""
    if seconds is None:
        return ""
    return f"ours {1e6 * seconds:.0f} µs" if seconds < 1e-3 else f"ours {1e3 * seconds:.3g} ms"


def _times(ratio: float) -> str:
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"
