"""The demo's picture: the layout, attention before and after, time and memory."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dense_attn import _files, reference
from dense_attn.demo.scene import PICTURE_GRID, Scene
from dense_attn.demo.step import (
    Layer,
    Measurement,
    make_inputs,
    megabytes,
    modulation_of,
    peaks,
    totals,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

BEFORE, AFTER = "#a3aab5", "#1f6feb"
SKY = "#f1f3f5"
REGION_COLOURS = (
    "#78b25c",
    "#1b784a",
    "#d6543e",
    "#5c628a",
    "#e0a32e",
    "#8e5ea2",
    "#3aa6b9",
    "#b5651d",
)
MAX_MARKS, MAX_BARS = 3, 6


@dataclass(frozen=True)
class Attention:
    """Probabilities of one kind of attention, a mean over heads, before and after modulation."""

    before: Tensor  # [M, N]
    after: Tensor  # [M, N]
    matched: Tensor  # bool [M, N]

    def share(self, rows: Tensor | slice) -> tuple[float, float]:
        """The share of some queries' attention inside their own regions, before and after."""
        return tuple(
            (p[rows] * self.matched[rows]).sum(-1).mean().item() for p in (self.before, self.after)
        )


def attention(scene: Scene, kind: str) -> Attention:
    """Attention of the conditional half of a 32 x 32 layer, from the formula itself."""
    layer = Layer(PICTURE_GRID, 80, 1, kind)
    q, k, _ = (x[1] for x in make_inputs(layer, seed=PICTURE_GRID))  # [H, tokens, D]
    words = modulation_of(layer, scene.layout)
    matched = (words["q_regions"][:, None] & words["k_regions"]) != 0  # [M, N]
    scores = (q @ k.transpose(-1, -2) * layer.head_dim**-0.5)[None]  # [1, H, M, N]
    modulated = reference.modulate(scores, matched, words["strength"][1:], "range")
    return Attention(*(x.softmax(-1)[0].mean(0) for x in (scores, modulated)), matched)


def deepest_token(mask: Tensor) -> tuple[int, int]:
    """(row, column) of a token of a mask [h, w] that is as far from the mask's edge as any."""
    inside = mask.float()[None, None]
    while True:
        eroded = -torch.nn.functional.max_pool2d(
            torch.nn.functional.pad(-inside, (1, 1, 1, 1), value=0.0), 3, 1
        )
        if not eroded.any():
            return tuple(inside[0, 0].nonzero()[0].tolist())
        inside = eroded


def draw(scene: Scene, measurements: list[Measurement], output: Path) -> None:
    """Write the picture to a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 9.4), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.1)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.75, 1), hspace=0.04)
    left, right = upper.subfigures(1, 2, width_ratios=(1, 1.6))
    masks = scene.layout.query_regions(PICTURE_GRID, PICTURE_GRID)  # [M]
    regions = _largest_regions(scene)
    marks = {
        r: deepest_token(_in_region(masks, r).view(PICTURE_GRID, -1)) for r in regions[:MAX_MARKS]
    }
    self_attention, cross_attention = attention(scene, "self"), attention(scene, "cross")
    _draw_layout(left, scene, marks)
    _draw_marks(right, scene, marks, self_attention)
    axes = lower.subplots(1, 4, width_ratios=(1.15, 1.15, 1, 1))
    _draw_shares(
        axes[0], scene, regions, self_attention, "Attention to its own region\n(image to image)"
    )
    _draw_shares(
        axes[1], scene, regions, cross_attention, "Attention to its own phrase\n(image to text)"
    )
    axes[0].legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=2, frameon=False, fontsize=10
    )
    _draw_costs(axes[2], axes[3], measurements)
    figure.supxlabel(
        f"Queries and keys are random, smooth like an image's. Attention: {PICTURE_GRID} x "
        f"{PICTURE_GRID} tokens, "
        "mean of 8 heads, first denoising step,\nbrightness = square root of the weight. "
        "Official code: its formula in plain PyTorch, every score and mask in memory.",
        fontsize=9.5,
        color="#57606a",
    )
    _files.write_by(output, partial(figure.savefig, format=output.suffix[1:]))


def _in_region(words: Tensor, region: int) -> Tensor:
    return (words >> region) & 1 == 1


def _largest_regions(scene: Scene) -> list[int]:
    """Regions that cover a token of the picture's grid, largest first."""
    words = scene.layout.query_regions(PICTURE_GRID, PICTURE_GRID)
    sizes = {r: int(_in_region(words, r).sum()) for r in range(len(scene.layout))}
    return sorted((r for r in sizes if sizes[r]), key=lambda r: -sizes[r])


def _colour(region: int) -> str:
    return REGION_COLOURS[region % len(REGION_COLOURS)]


def _draw_layout(figure: SubFigure, scene: Scene, marks: dict[int, tuple[int, int]]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    axes = figure.subplots()
    pixels = np.tile(to_rgb(SKY), (*scene.layout.masks.shape[1:], 1))  # [H, W, 3]
    for r, mask in enumerate(scene.layout.masks):
        pixels[mask.numpy()] = to_rgb(_colour(r))
    axes.imshow(
        pixels, extent=(-0.5, PICTURE_GRID - 0.5, PICTURE_GRID - 0.5, -0.5), interpolation="nearest"
    )
    for letter, (row, column) in zip("ABC", marks.values()):
        axes.text(
            column,
            row,
            letter,
            ha="center",
            va="center",
            fontsize=13,
            weight="bold",
            bbox={"boxstyle": "circle,pad=0.25", "facecolor": "white", "edgecolor": "black"},
        )
    axes.set(xticks=[], yticks=[])
    axes.set_title("The layout: what belongs where", fontsize=14, weight="bold")
    few = len(scene.phrases) <= len(REGION_COLOURS)
    letters = {r: f" ({letter})" for letter, r in zip("ABC", marks)}
    names = [
        ("" if few else f"{r + 1} ") + _short(phrase) + letters.get(r, "")
        for r, phrase in enumerate(scene.phrases)
    ]
    handles = [Patch(color=_colour(r), label=name) for r, name in enumerate(names)]
    if not few:  # colours repeat: numbers tell the regions apart
        _draw_numbers(axes, scene, marks)
    axes.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.01),
        frameon=False,
        ncols=2 if few else 4,
        fontsize=11 if few else 8,
    )


def _draw_numbers(axes: Axes, scene: Scene, marks: dict[int, tuple[int, int]]) -> None:
    words = scene.layout.query_regions(PICTURE_GRID, PICTURE_GRID)
    for r in _largest_regions(scene):
        if r not in marks:
            row, column = deepest_token(_in_region(words, r).view(PICTURE_GRID, -1))
            axes.text(
                column,
                row,
                str(r + 1),
                ha="center",
                va="center",
                fontsize=9,
                weight="bold",
                color="white",
            )


def _draw_marks(
    figure: SubFigure, scene: Scene, marks: dict[int, tuple[int, int]], attended: Attention
) -> None:
    axes = figure.subplots(2, len(marks), squeeze=False)
    words = scene.layout.query_regions(PICTURE_GRID, PICTURE_GRID)
    for column, (letter, (region, (row, col))) in enumerate(zip("ABC", marks.items())):
        token = row * PICTURE_GRID + col
        shares = attended.share(slice(token, token + 1))
        # the root shows weak attention too; one scale for both, so that brighter means more
        ceiling = max(
            p[token].quantile(0.995).sqrt().item() for p in (attended.before, attended.after)
        )
        for line, (when, probabilities) in enumerate(
            (("before", attended.before), ("after", attended.after))
        ):
            panel = axes[line, column]
            image = probabilities[token].view(PICTURE_GRID, -1).sqrt()
            panel.imshow(image.numpy(), cmap="magma", vmin=0, vmax=ceiling, interpolation="nearest")
            own = _in_region(words, region).view(PICTURE_GRID, -1)
            # a margin closes the outline at the image's edge
            padded = torch.nn.functional.pad(own.float(), (1, 1, 1, 1))
            ticks = range(-1, PICTURE_GRID + 1)
            panel.contour(
                ticks, ticks, padded.numpy(), levels=[0.5], colors="white", linewidths=1.1
            )
            panel.plot(
                col,
                row,
                marker="o",
                markersize=8,
                markerfacecolor=_colour(region),
                markeredgecolor="white",
            )
            panel.set(
                xticks=[],
                yticks=[],
                xlim=(-0.6, PICTURE_GRID - 0.4),
                ylim=(PICTURE_GRID - 0.4, -0.6),
            )
            panel.set_title(f"{letter} {when}: {shares[line]:.0%} inside its region", fontsize=11)
    title = "Where a marked pixel looks: plain attention (top), with the layout (bottom)"
    figure.suptitle(title, fontsize=14, weight="bold")


def _draw_shares(
    axes: Axes, scene: Scene, regions: list[int], attended: Attention, title: str
) -> None:
    words = scene.layout.query_regions(PICTURE_GRID, PICTURE_GRID)
    shown = regions[:MAX_BARS]
    shares = [attended.share(_in_region(words, r)) for r in shown]
    for way, (label, colour, shift) in enumerate(
        (("plain", BEFORE, -0.2), ("with the layout", AFTER, 0.2))
    ):
        values = [100 * share[way] for share in shares]
        bars = axes.barh(
            [y + shift for y in range(len(shown))], values, 0.38, color=colour, label=label
        )
        axes.bar_label(bars, fmt="%.0f%%", padding=2, fontsize=9)
    axes.set_yticks(range(len(shown)), [_short(scene.phrases[r]) for r in shown], fontsize=10)
    axes.set(xlim=(0, 118), ylim=(max(len(shown), MAX_MARKS) - 0.5, -0.5), xticks=[])
    more = f" ({len(shown)} largest of {len(regions)})" if len(regions) > len(shown) else ""
    axes.set_title(title + more, fontsize=12, weight="bold")
    _clean(axes)


def _draw_costs(time_axes: Axes, memory_axes: Axes, measurements: list[Measurement]) -> None:
    seconds = totals(measurements)
    labels = [f"{s:.1f} s" if s >= 1 else f"{1e3 * s:.0f} ms" for s in seconds]
    count = sum(m.layer.count for m in measurements)
    _draw_pair(time_axes, f"Time of {count} layers", seconds, labels)
    sizes = peaks(measurements)
    if None in sizes:
        memory_axes.axis("off")
        memory_axes.set_title(
            "Extra peak memory:\nmeasured on Linux alone", fontsize=12, weight="bold"
        )
        return
    _draw_pair(memory_axes, "Extra peak memory", sizes, [f"{megabytes(size)} MB" for size in sizes])


def _draw_pair(axes: Axes, title: str, values: tuple[float, float], labels: list[str]) -> None:
    bars = axes.bar(["official\ncode", "dense_attn"], values, 0.6, color=(BEFORE, AFTER))
    axes.bar_label(bars, labels, padding=3, fontsize=11, weight="bold")
    axes.set_ylim(0, 1.25 * max(*values, 1e-9))
    axes.set_yticks([])
    axes.tick_params(axis="x", labelsize=11)
    less, more = sorted(values)
    word = "less" if values[1] <= values[0] else "more"
    ratio = f"\n{more / less:.{0 if more >= 10 * less else 1}f}x {word}" if less else ""
    axes.set_title(title + ratio, fontsize=12, weight="bold")
    _clean(axes)


def _clean(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _short(phrase: str, length: int = 22) -> str:
    return phrase if len(phrase) <= length else phrase[: length - 1] + "…"
