"""The study of layouts: plain, paint-with-words, DenseDiffusion, and that without its parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dense_attn import _progress

from .scenes import Scene, colour_masks, draw_scene, shape_of
from .score import (
    LAYOUTS,
    batches,
    generate,
    kernels,
    laid_out,
    markdown,
    only_palette,
    said,
    score,
    summary,
)

SIMILAR = ("red", "orange", "yellow")
CHOSEN = "DenseDiffusion, chosen weight"
WEIGHTS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
TUNED: dict[
    str, tuple[dict[str, Any], tuple[float, ...]]
] = {  # cross_weights that are tried; self_weight is 0.3 of it
    CHOSEN: ({}, WEIGHTS),
    "without value-range adaptivity": ({"modulation": "bias"}, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)),
    "without area adaptivity": ({"size_weight": 0.0}, WEIGHTS),
}
GATE = ("both present", "no other colour", "shape right", "both present in their shapes")
METRICS = ("present", "iou", "swapped", "off_palette")


def gate(pipe: StableDiffusionPipeline, count: int = 200) -> dict[str, Any]:
    """The shares of held-out prompts of two things, without layouts, that show what they say."""
    rng = random.Random(7)
    scenes = [draw_scene(rng, 2, unseen=True) for _ in range(count)]
    both, clean, shapes = [], [], []
    for part in _progress.track(batches(list(enumerate(scenes))), "gate"):
        images = generate(pipe, [scene.caption for _, scene in part], [10_000 + i for i, _ in part])
        found = colour_masks(images)
        both += score(images, [scene for _, scene in part])["present"].tolist()
        for b, (_, scene) in enumerate(part):
            clean.append(
                float(only_palette(images[b : b + 1], [thing.colour for thing in scene.things]))
            )
            seen = [(thing, found[thing.colour][b]) for thing in scene.things]
            shapes.append(
                [float(mask.any() and shape_of(mask) == thing.shape) for thing, mask in seen]
            )
    return {
        "prompts": count,
        "both present": sum(both) / count,
        "no other colour": sum(clean) / count,
        "shape right": sum(map(sum, shapes)) / (2 * count),
        "both present in their shapes": sum(there * min(pair) for there, pair in zip(both, shapes))
        / count,
    }


def study(
    pipe: StableDiffusionPipeline,
    count: int = 200,
    seeds: int = 3,
    backend: str = "auto",
    similar: bool = False,
) -> dict[str, Any]:
    """Every setting on the same layouts and noises.

    Args:
        pipe: the model.
        count: of layouts, of two things; three of similar colours if `similar`.
        seeds: noises of each layout.
        backend: of `apply_layout`.
        similar: things in red, orange and yellow that touch.
    """
    rng = random.Random(11 + similar)
    draw = (
        (lambda: draw_scene(rng, 3, colours=SIMILAR, touching=True))
        if similar
        else (lambda: draw_scene(rng, 2))
    )
    tuning, scenes = [draw() for _ in range(max(4, count // 5))], [draw() for _ in range(count)]
    settings, weights = matched(pipe, tuning, backend)
    rows: dict[str, dict[str, Tensor]] = {}
    work = [(scene, seeds * i + seed) for i, scene in enumerate(scenes) for seed in range(seeds)]
    parts_of_all = len(settings) * len(list(batches(work)))
    with _progress.bar(parts_of_all, "layouts", shown=True, unit="batch") as advance:
        for name, setting in settings.items():
            rows[name] = scores(pipe, work, setting, backend, advance)
    return {
        "layouts": count,
        "seeds": seeds,
        "things": 3 if similar else 2,
        "backend": backend,
        "settings": {name: setting for name, setting in settings.items() if setting is not None},
        "tuned": weights,
        "rows": {
            name: row(
                name, rows, count, ("plain", "DenseDiffusion", *([CHOSEN] if name in TUNED else []))
            )
            for name in rows
        },
    }


def matched(
    pipe: StableDiffusionPipeline, tuning: list[Scene], backend: str
) -> tuple[dict[str, dict[str, Any] | None], dict[str, dict[str, float]]]:
    """All settings, and the IoU of every weight tried on layouts of their own.

    The two ablations whose weights need a match, and the whole method beside them, take the best of
    theirs.
    """
    settings, found = dict(LAYOUTS), {}
    work = [(scene, 5000 + i) for i, scene in enumerate(tuning)]
    for name, (options, weights) in _progress.track(TUNED.items(), "weights", "setting"):
        tried = {
            weight: options | {"cross_weight": weight, "self_weight": 0.3 * weight}
            for weight in weights
        }
        ious = {
            weight: scores(pipe, work, tried[weight], backend)["iou"].mean().item()
            for weight in weights
        }
        found[name] = {str(weight): iou for weight, iou in ious.items()}
        settings[name] = tried[max(ious, key=ious.get)]
    return settings, found


def row(
    name: str, rows: dict[str, dict[str, Tensor]], groups: int, others: Sequence[str]
) -> dict[str, Any]:
    """Means, and differences to other settings on the same layouts and noises."""
    values = rows[name]
    paired = {
        f"{metric} - {other}": summary(values[metric] - rows[other][metric], groups)
        for metric in ("present", "iou")
        for other in others
    }
    return {metric: summary(values[metric], groups) for metric in METRICS} | paired


def same_tables(pipe: StableDiffusionPipeline, count: int) -> dict[str, Any]:
    """How far kernels and reference are apart: in a pixel, an image's score, and a table's mean."""
    name, rng = kernels("layout_attention"), random.Random(13)
    work = [(draw_scene(rng, 2), seed) for seed in range(count)]
    settings = {name: LAYOUTS[name] for name in ("paint-with-words", "DenseDiffusion")} | {
        "bias": {"modulation": "bias"}
    }
    pixel, scores = 0.0, {metric: [] for metric in METRICS}
    for part, setting in _progress.track(
        [*product(batches(work), settings.values())], "layouts, both backends"
    ):
        scenes, seeds = zip(*part)
        ours, theirs = (
            laid_out(pipe, scenes, seeds, setting, backend) for backend in ("auto", "reference")
        )
        pixel = max(pixel, (ours - theirs).abs().max().item())
        pair = score(ours, scenes), score(theirs, scenes)
        for metric in METRICS:
            scores[metric].append(pair[0][metric] - pair[1][metric])
    apart = torch.stack([torch.cat(values).view(-1) for values in scores.values()])
    return {
        "layouts": count,
        "settings": list(settings),
        "backend": name,
        "of a pixel": pixel,
        "of an image": apart.abs().max().item(),
        "of a mean": apart.mean(1).abs().max().item(),
    }


def scores(
    pipe: StableDiffusionPipeline,
    work: list[tuple[Scene, int]],
    setting: dict | None,
    backend: str,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """The scores of an image of each scene and seed."""
    parts = []
    for part in batches(work):
        scenes, seeds = zip(*part)
        parts.append(score(laid_out(pipe, scenes, seeds, setting, backend), scenes))
        advance()
    return {metric: torch.cat([part[metric] for part in parts]) for metric in METRICS}


def table(study: dict[str, Any]) -> str:
    """A study's rows as Markdown."""
    title = f"{study['layouts']} layouts of {study['things']} things, {study['seeds']} seeds each"
    others = ("plain", "DenseDiffusion", CHOSEN)
    rows = []
    for name, row in study["rows"].items():
        means = (said(row["present"]), said(row["iou"]), f"{row['swapped']['mean']:.3f}")
        differences = [row.get(f"iou - {other}") if other != name else None for other in others]
        paired = ("-" if found is None else said(found, "+.3f") for found in differences)
        rows.append([name, *means, *paired, f"{row['off_palette']['mean']:.3f}"])
    head = [title, "all things there", "IoU with the layout", "swapped layout", "IoU over plain"]
    head += ["IoU over DenseDiffusion", "IoU over chosen weight", "off palette"]
    return markdown(head, rows)
