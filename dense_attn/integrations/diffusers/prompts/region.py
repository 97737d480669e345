"""A user's regions with prompts of their own, checked, as texts and one tensor of masks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks

from ..regions import BOXES, _box, _is_box, _kind, _mask

MOST = 30  # regions of an image: the call's prompt and the image have bits beside theirs


@dataclass(frozen=True, eq=False)
class Region:
    """A part of an image with a prompt of its own, for `apply_layout`.

    Args:
        mask: a bool array [H, W], a PIL image, light and opaque there, a box (x0, y0, x1, y1) in
            0..1, or floats [H, W] in 0..1 for soft edges; of a video's frames [F, H, W].
        prompt: what the region shows.
        weight: its share where regions overlap, beside their weights; above 0.
        negative: what it does not show, in the place of the call's negative prompt.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import Region, apply_layout
        >>> pipe = tiny_pipeline(StableDiffusionPipeline)
        >>> left, right = Region((0, 0, 0.5, 1), "a cat"), Region((0.5, 0, 1, 1), "a dog")
        >>> with apply_layout(pipe, "on a lawn", [left, right], base_ratio=0.2):
        ...     image = pipe("on a lawn", num_inference_steps=4).images[0]
    """

    mask: Any
    prompt: str
    weight: float = 1.0
    negative: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str):
            _checks.refuse("prompt", "be a string", type(self.prompt).__name__, TypeError)
        if self.negative is not None and not isinstance(self.negative, str):
            kind = type(self.negative).__name__
            _checks.refuse("negative", "be a string or None", kind, TypeError)
        if _checks.number("weight", self.weight, torch.float32) <= 0:
            _checks.refuse("weight", "be above 0", self.weight)
        if self.weight < torch.finfo(torch.float32).tiny:
            _checks.refuse("weight", "be at least float32's smallest, 1.2e-38", self.weight)


class Regions(NamedTuple):
    """The regions of one image."""

    prompts: list[str]
    negatives: list[str | None]
    weights: Tensor  # float32 [R]
    masks: Tensor  # float32 [R, H, W], of each frame [R, F, H, W], 0..1


def has_prompts(regions: object) -> bool:
    """Whether regions are of this kind, for one image or each of several."""
    if not isinstance(regions, Sequence) or isinstance(regions, str):
        return False
    first = [image[0] if isinstance(image, list) and image else image for image in regions]
    return any(isinstance(region, Region) for region in first)


def parse(regions: Sequence[Any], prompts: list[str] | None, video: bool = False) -> list[Regions]:
    """One entry for all prompts, or one for each; without prompts they cover the image."""
    base = prompts is not None
    if all(isinstance(image, list) for image in regions):
        if base and len(prompts) != len(regions):
            rule = f"hold one list for each of the {len(prompts)} prompts"
            _checks.refuse("regions", rule, len(regions))
        return [_one_image(f"regions[{b}]", image, base, video) for b, image in enumerate(regions)]
    return [_one_image("regions", regions, base, video)]


def _one_image(argument: str, regions: Sequence[Any], base: bool, video: bool) -> Regions:
    if len(regions) > MOST:
        _checks.refuse(argument, f"hold at most {MOST} regions with prompts", len(regions))
    for r, region in enumerate(regions):
        if not isinstance(region, Region):
            _checks.refuse(
                f"{argument}[{r}]", "be a Region as others are", _kind(region), TypeError
            )
    masks = _masks(argument, [region.mask for region in regions], video)
    bare = int((masks.sum(0) == 0).sum())
    if bare and not base:
        got = f"{bare} of {masks[0].numel()} pixels in no region"
        _checks.refuse(argument, "cover the image where prompt is None", got)
    weights = [region.weight for region in regions]
    return Regions(
        [region.prompt for region in regions],
        [region.negative for region in regions],
        torch.tensor(weights, dtype=torch.float32, device="cpu"),
        masks,
    )


def _masks(argument: str, masks: list[Any], video: bool) -> Tensor:
    """The masks of one image, float32 [R, H, W], or [R, F, H, W] where any has frames."""
    drawn = [
        None if _is_box(mask) else _values(f"{argument}[{r}]", mask, video)
        for r, mask in enumerate(masks)
    ]
    there = [mask for mask in drawn if mask is not None]
    size = next((tuple(mask.shape[-2:]) for mask in there), BOXES)
    length = next((len(mask) for mask in there if mask.dim() == 3), None)
    for r, box in enumerate(masks):
        if drawn[r] is None:
            drawn[r] = _box(f"{argument}[{r}]", box, size).float()
        if tuple(drawn[r].shape[-2:]) != size:
            rule = f"have a mask of the size {size} of the others"
            _checks.refuse(f"{argument}[{r}]", rule, tuple(drawn[r].shape[-2:]))
        if drawn[r].dim() == 3 and len(drawn[r]) != length:
            rule = f"have a mask of as many frames as the others, {length}"
            _checks.refuse(f"{argument}[{r}]", rule, len(drawn[r]))
        if length is not None:
            drawn[r] = drawn[r].expand(length, *size)
    empty = torch.zeros(0, *size, dtype=torch.float32, device="cpu")
    return torch.stack(drawn) if drawn else empty


def _values(argument: str, mask: Any, video: bool) -> Tensor:
    """A float32 tensor [H, W] on the CPU, or [F, H, W] where it is of a video's frames."""
    ours = isinstance(mask, np.ndarray) and mask.dtype in (np.float16, np.float32, np.float64)
    soft = torch.from_numpy(np.array(mask)) if ours else mask  # torch has no other floats
    if not isinstance(soft, Tensor) or not soft.is_floating_point():
        return _mask(argument, mask, video).float()
    _checks.readable(argument, soft, "a mask that can be looked at")
    soft = soft.detach().to("cpu", torch.float32, copy=True)
    if soft.dim() != 2 and not (video and soft.dim() == 3):
        _checks.refuse(argument, "have a mask of 2 dimensions [height, width]", tuple(soft.shape))
    if not bool(((soft >= 0) & (soft <= 1)).all()):
        _checks.refuse(argument, "have a mask of values in 0..1", "others")
    if not soft.any():
        _checks.refuse(argument, "have a mask of at least one pixel", "none")
    return soft
