"""Images of prompts and layouts, and what is in them: counted, with standard errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from dense_attn._backends import table
from dense_attn.integrations.diffusers import Region, apply_layout

from .scenes import COLOURS, PRESENT, Scene, colour_masks, masks

STEPS, GUIDANCE = 20, 7.5
BATCH = 25
# Of log(1 + sigma), which paint-with-words multiplies by 0.4: 2.75 at the start, and about
# time**1.7 of that after it.
LAYOUTS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "paint-with-words": {
        "modulation": "max", "cross_weight": 1.1, "self_weight": 0.0, "exponent": 1.7,
        "size_weight": 0.0, "active": 1.0, "encode_phrases": False,
    },
    "DenseDiffusion": {},
    "without cross-modulation": {"cross_weight": 0.0},
    "without self-modulation": {"self_weight": 0.0},
}  # fmt: skip


def generate(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | None,
    seeds: Sequence[int],
    inside: Any = None,
    **options: Any,
) -> Tensor:
    """Images [B, 3, 32, 32] in 0..1, each from the noise of its own seed."""
    block: AbstractContextManager = nullcontext() if inside is None else inside
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    options = usual_of(pipe) | options
    with block:
        images = pipe(
            prompts and list(prompts), generator=generators, output_type="pt", **options
        ).images
    return images.cpu()


def usual_of(pipe: DiffusionPipeline) -> dict[str, Any]:
    """How a model makes its images."""
    usual = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
    return usual | getattr(pipe, "usual", {})


def laid_out(
    pipe: DiffusionPipeline,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    setting: dict | None,
    backend: str,
) -> Tensor:
    """An image of each scene's caption, under its layout by the options of `apply_layout`.

    With "prompts" among the options a scene's phrases are prompts of their regions.
    """
    prompts = [scene.caption for scene in scenes]
    if setting is None:
        return generate(pipe, prompts, seeds)
    options = {name: value for name, value in setting.items() if name != "prompts"}
    regions = [list(zip(scene.phrases, masks(scene).numpy())) for scene in scenes]
    if setting.get("prompts"):
        regions = [[Region(mask, phrase) for phrase, mask in own] for own in regions]
    return generate(
        pipe, prompts, seeds, apply_layout(pipe, prompts, regions, backend=backend, **options)
    )


def kernels(op: str) -> str:
    """The backend of an op here, to be compared with the reference, which it must not be."""
    name = table.resolve("auto", op, torch.empty(1, 1, 1, 1, dtype=torch.float32, device="cpu"))
    if name == "reference":
        raise RuntimeError(f"{op} must have a backend that is not the reference, got {name}")
    return name


def batches(items: Sequence[Any], size: int = BATCH) -> Iterator[Sequence[Any]]:
    """One after the other."""
    return (items[start : start + size] for start in range(0, len(items), size))


def score(images: Tensor, scenes: Sequence[Scene]) -> dict[str, Tensor]:
    """Each image's scores: all things there, overlap with right and swapped layouts, no colour."""
    found = colour_masks(images)
    rows: dict[str, list[float]] = {"present": [], "iou": [], "swapped": [], "off_palette": []}
    for b, scene in enumerate(scenes):
        targets, seen = masks(scene), [found[thing.colour][b] for thing in scene.things]
        rows["present"].append(float(all(mask.sum() >= PRESENT for mask in seen)))
        rows["iou"].append(_mean(iou(mask, target) for mask, target in zip(seen, targets)))
        rows["swapped"].append(
            _mean(iou(mask, target) for mask, target in zip(seen, targets.roll(1, 0)))
        )
        rows["off_palette"].append(
            1 - float(sum(mask[b].float().mean() for mask in found.values()))
        )
    return {
        name: torch.tensor(values, dtype=torch.float32, device="cpu")
        for name, values in rows.items()
    }


def has(images: Tensor, colour: str) -> Tensor:
    """Pixels of a colour in each image."""
    return colour_masks(images)[colour].flatten(1).sum(1)


def only_palette(images: Tensor, colours: Sequence[str]) -> Tensor:
    """Whether each image has the colours and no other one of a thing."""
    there = {name: mask.flatten(1).sum(1) >= PRESENT for name, mask in colour_masks(images).items()}
    right = torch.stack([there[name] if name in colours else ~there[name] for name in COLOURS])
    return right.all(0)


def summary(values: Tensor, groups: int) -> dict[str, float | None]:
    """The mean of values in groups (a layout's seeds), and the standard error over groups."""
    if not groups:
        return {"mean": None, "error": None}
    means = values.view(groups, -1).mean(1)
    return {
        "mean": means.mean().item(),
        "error": (means.std() / groups**0.5).item() if groups > 1 else None,
    }


def said(found: dict[str, float | None], form: str = ".3f") -> str:
    """A mean and its standard error, as far as there are any."""
    numbers = ((found["mean"], form), (found["error"], form.lstrip("+")))
    return " ± ".join(f"{number:{how}}" for number, how in numbers if number is not None) or "-"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def iou(a: Tensor, b: Tensor) -> float:
    """Overlap of two masks: their intersection over their union."""
    return float((a & b).sum().float() / (a | b).sum().clamp(min=1))


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return sum(listed) / len(listed)
