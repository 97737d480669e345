"""Semantic guidance over two of its options at once, as in figures 11 to 13 of its paper."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from dense_attn import _files, _progress

from ..edits import CURVES, USUAL, OpenPrompt, effect, open_prompts
from ..score import generate, markdown, said

SCALES = (3.0, 6.0, 12.0)
AXES: dict[str, tuple[str, tuple[float, ...], str, tuple[float, ...]]] = {  # of rows, of columns
    "warm-up": ("scale", SCALES, "warmup", (0, 2, 5, 10)),
    "threshold": ("scale", SCALES, "threshold", (0.0, 0.5, 0.8, 0.95)),
    "momentum": ("momentum_scale", (0.0, 0.1, 0.3, 0.6), "momentum_beta", (0.0, 0.4, 0.8)),
}
MOMENTUM = {"momentum_scale": 0.1, "momentum_beta": 0.4}


def study(pipe: DiffusionPipeline, count: int = 12) -> dict[str, Any]:
    """All grids on `count` prompts of each kind, the options not on an axis as usual."""
    grids: dict[str, Any] = {kind: {} for kind in CURVES}
    total = len(CURVES) * sum(len(axes[1]) * len(axes[3]) for axes in AXES.values())
    with _progress.bar(total, "grids", shown=True, unit="setting") as advance:
        for kind in CURVES:
            own = open_prompts(kind, count)
            plain, known = generate(pipe, [case.prompt for case in own], range(count)), {}
            for grid, (row, rows, column, columns) in AXES.items():
                found = grids[kind][grid] = {}
                for x in rows:
                    found[str(x)] = {}
                    for y in columns:
                        setting = USUAL | MOMENTUM | {row: x, column: y}
                        if not setting["momentum_scale"]:
                            setting["momentum_beta"] = 0.0
                        key = tuple(setting.values())
                        if key not in known:
                            known[key] = _cell(pipe, own, plain, setting)
                        found[str(x)][str(y)] = known[key]
                        advance()
    return {"prompts": count, "usual": USUAL | MOMENTUM, "grids": grids}


def _cell(
    pipe: DiffusionPipeline, own: list[OpenPrompt], plain: Tensor, setting: dict[str, float]
) -> dict[str, Any]:
    options = {name: value for name, value in setting.items() if name not in MOMENTUM}
    momentum = {name: setting[name] for name in MOMENTUM}
    found = effect(pipe, own, plain, momentum=momentum, **options)
    return {name: found[name] for name in ("gain", "others", "changed")}


def table(result: dict[str, Any]) -> str:
    """Pixels gained and the share that changed, over each pair of options, as Markdown."""
    shown = []
    for grid, (row, _, column, columns) in AXES.items():
        head = [f"{row} down, {column} across", *(f"{value:g}" for value in columns)]
        rows = [
            [f"{kind}, {float(value):g}"]
            + [f"{said(cell['gain'], '+.0f')}, {cell['changed']:.0%}" for cell in cells.values()]
            for kind, found in result["grids"].items()
            for value, cells in found[grid].items()
        ]
        shown.append(markdown([name.replace("_", " ") for name in head], rows))
    return "\n\n".join(shown)


def plot(result: dict[str, Any], output: Path) -> None:
    """A heat map for each kind and pair of options: pixels gained, and the share that changed."""
    from matplotlib.figure import Figure

    figure = Figure((9.5, 5), dpi=110, layout="constrained")
    places = figure.subplots(len(result["grids"]), len(AXES), squeeze=False)
    for line, (kind, grids) in zip(places, result["grids"].items()):
        cells = [cell for grid in grids.values() for row in grid.values() for cell in row.values()]
        most = max(cell["gain"]["mean"] for cell in cells)
        for axes, (grid, found) in zip(line, grids.items()):
            row, rows, column, columns = AXES[grid]
            gains = [[cell["gain"]["mean"] for cell in each.values()] for each in found.values()]
            axes.imshow(gains, cmap="viridis", vmin=0, vmax=most, aspect="auto")
            axes.set_xticks(range(len(columns)), [f"{value:g}" for value in columns])
            axes.set_yticks(range(len(rows)), [f"{value:g}" for value in rows])
            labels = (name.replace("_", " ") for name in (column, row))
            axes.set(title=kind, **dict(zip(("xlabel", "ylabel"), labels)))
            for i, each in enumerate(found.values()):
                for j, cell in enumerate(each.values()):
                    text = f"{cell['gain']['mean']:+.0f}\n{cell['changed']:.0%}"
                    shade = "black" if cell["gain"]["mean"] > 0.6 * most else "white"
                    axes.text(j, i, text, ha="center", va="center", fontsize=7, color=shade)
    _files.write_by(output, partial(figure.savefig, format=output.suffix[1:]))
