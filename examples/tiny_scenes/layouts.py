"""What a layout does: plain, paint-with-words, DenseDiffusion and DenseDiffusion without each of its parts."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dense_attn import _progress

from .scenes import Scene, colour_masks, draw_scene, masks, shape_of
from .score import LAYOUTS, batches, generate, laid_out, only_palette, score, summary

SIMILAR = ("red", "orange", "yellow")
TUNED = (0.5, 1.0, 2.0, 4.0, 8.0)  # of the constant in the place of the range of scores
METRICS = ("present", "iou", "swapped", "off_palette")


def gate(pipe: StableDiffusionPipeline, count: int = 200) -> dict[str, float]:
    """Without layouts: the part of held-out two-thing prompts that show both in the right colour, and right shapes."""
    rng = random.Random(7)
    scenes = [draw_scene(rng, 2, unseen=True) for _ in range(count)]
    both, clean, shapes = [], [], []
    for part in batches(list(enumerate(scenes))):
        images = generate(pipe, [scene.caption for _, scene in part], [10_000 + i for i, _ in part])
        found = colour_masks(images)
        both.append(score(images, [scene for _, scene in part])["present"])
        for b, (_, scene) in enumerate(part):
            clean.append(float(only_palette(images[b : b + 1], [thing.colour for thing in scene.things])))
            seen = [(thing, found[thing.colour][b]) for thing in scene.things]
            shapes += [float(shape_of(mask) == thing.shape) for thing, mask in seen if mask.any()]
    return {
        "prompts": count, "both present": torch.cat(both).mean().item(), "no other colour": sum(clean) / count,
        "shape right": sum(shapes) / max(1, len(shapes)),
    }  # fmt: skip


def study(
    pipe: StableDiffusionPipeline, count: int = 200, seeds: int = 3, backend: str = "auto", similar: bool = False
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
    draw = (lambda: draw_scene(rng, 3, colours=SIMILAR, touching=True)) if similar else (lambda: draw_scene(rng, 2))
    tuning, scenes = [draw() for _ in range(max(4, count // 5))], [draw() for _ in range(count)]
    settings = LAYOUTS | matched(pipe, tuning, backend)
    rows: dict[str, dict[str, Tensor]] = {}
    work = [(scene, seeds * i + seed) for i, scene in enumerate(scenes) for seed in range(seeds)]
    parts_of_all = len(settings) * len(list(batches(work)))
    with _progress.bar(parts_of_all, "layouts", shown=True, unit="batch") as advance:
        for name, setting in settings.items():
            rows[name] = _scores(pipe, work, setting, backend, advance)
    return {
        "layouts": count, "seeds": seeds, "things": 3 if similar else 2, "backend": backend,
        "settings": {name: setting for name, setting in settings.items() if setting is not None},
        "rows": {name: _row(values, rows["plain"], count) for name, values in rows.items()},
    }  # fmt: skip


def matched(pipe: StableDiffusionPipeline, tuning: list[Scene], backend: str) -> dict[str, dict[str, Any]]:
    """The ablations whose strengths need a match: the constant that does best on layouts of their own, and the mean."""
    best, at = -1.0, TUNED[0]
    seeds = [5000 + i for i in range(len(tuning))]
    for constant in TUNED:
        setting = {"modulation": "bias", "cross_weight": constant, "self_weight": 0.3 * constant}
        images = [(laid_out(pipe, part, seeds[: len(part)], setting, backend), part) for part in batches(tuning)]
        if (iou := torch.cat([score(*pair)["iou"] for pair in images]).mean().item()) > best:
            best, at = iou, constant
    shares = torch.cat([masks(scene).flatten(1).float().mean(1) for scene in tuning])
    mean = (1 - shares).mul(shares).sum().div(shares.sum()).item()  # over the pixels of regions
    return {
        "without value-range adaptivity": {"modulation": "bias", "cross_weight": at, "self_weight": 0.3 * at},
        "without area adaptivity": {"size_weight": 0.0, "cross_weight": mean, "self_weight": 0.3 * mean},
    }


def _row(values: dict[str, Tensor], plain: dict[str, Tensor], groups: int) -> dict[str, Any]:
    """Means, and differences to the plain images of the same layouts and noises."""
    row = {metric: summary(values[metric], groups) for metric in METRICS}
    return row | {"iou - plain": summary(values["iou"] - plain["iou"], groups)}


def same_tables(pipe: StableDiffusionPipeline, count: int) -> dict[str, Any]:
    """Scores of the kernels and of the reference on the same layouts: of an image, and the mean that a table shows."""
    rng = random.Random(13)
    work = [(draw_scene(rng, 2), seed) for seed in range(count)]
    settings = {name: LAYOUTS[name] for name in ("paint-with-words", "DenseDiffusion")} | {
        "bias": {"modulation": "bias"}
    }
    image = mean = 0.0
    for setting in settings.values():
        ours, theirs = (_scores(pipe, work, setting, backend) for backend in ("auto", "reference"))
        for metric in METRICS:
            away = ours[metric] - theirs[metric]
            image, mean = max(image, away.abs().max().item()), max(mean, away.mean().abs().item())
    return {"layouts": count, "settings": list(settings), "of an image": image, "of a mean": mean}


def _scores(
    pipe: StableDiffusionPipeline, work: list[tuple[Scene, int]], setting: dict | None, backend: str,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:  # fmt: skip
    """Of an image of each scene and seed."""
    parts = []
    for part in batches(work):
        scenes, seeds = zip(*part)
        parts.append(score(laid_out(pipe, scenes, seeds, setting, backend), scenes))
        advance()
    return {metric: torch.cat([part[metric] for part in parts]) for metric in METRICS}


def table(study: dict[str, Any]) -> str:
    """A study's rows as text."""
    lines = [
        f"{study['layouts']} layouts of {study['things']} things, {study['seeds']} seeds (+- standard errors)",
        f"{'':32} {'present':>8} {'IoU with target':>17} {'swapped':>8} {'IoU - plain':>17} {'off palette':>12}",
    ]
    for name, row in study["rows"].items():
        iou, gain = (f"{row[key]['mean']:.3f} +- {row[key]['error']:.3f}" for key in ("iou", "iou - plain"))
        rest = {key: row[key]["mean"] for key in ("present", "swapped", "off_palette")}
        lines.append(f"{name:32} {rest['present']:8.3f} {iou:>17} {rest['swapped']:8.3f} {gain:>17} "
                     f"{rest['off_palette']:12.3f}")  # fmt: skip
    return "\n".join(lines)
