"""A user's regions, phrases with masks of several kinds, as phrases and one tensor of masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_attn import Layout, _checks, _pixels
from dense_attn.layout_attention.layout import MAX_REGIONS

from ..text.phrases import Phrase

BOXES = (512, 512)  # the grid on which boxes are drawn where no mask gives one


class Regions(NamedTuple):
    """The regions of one image."""

    phrases: list[Phrase | None]
    masks: Tensor  # bool [R, H, W], of each frame [R, F, H, W]


def parse(regions: object, num_prompts: int, video: bool = False) -> list[Regions]:
    """One entry for all prompts, or one for each; a video's masks may have frames."""
    if not isinstance(regions, Sequence) or isinstance(regions, str):
        _checks.refuse("regions", "be a list of (phrase, mask)", _kind(regions), TypeError)
    if not regions:
        _checks.refuse("regions", "hold at least one region", "none")
    if not _is_region(regions[0]):
        if len(regions) != num_prompts:
            rule = f"hold one list for each of the {num_prompts} prompts"
            _checks.refuse("regions", rule, len(regions))
        return [_one_image(f"regions[{b}]", image, video) for b, image in enumerate(regions)]
    return [_one_image("regions", regions, video)]


def _is_region(region: object) -> bool:
    return (
        isinstance(region, Sequence)
        and len(region) == 2
        and isinstance(region[0], (str, Phrase, type(None)))
    )


def _one_image(argument: str, regions: object, video: bool) -> Regions:
    if not isinstance(regions, Sequence) or not 1 <= len(regions) <= MAX_REGIONS:
        got = len(regions) if isinstance(regions, Sequence) else type(regions).__name__
        _checks.refuse(argument, f"hold 1 to {MAX_REGIONS} regions", got)
    for r, region in enumerate(regions):
        if not _is_region(region):
            rule = "be a pair (phrase, mask), or a Region in a list"
            _checks.refuse(f"{argument}[{r}]", rule, _kind(region), TypeError)
    drawn = [
        None if _is_box(mask) else _mask(f"{argument}[{r}]", mask, video)
        for r, (_, mask) in enumerate(regions)
    ]
    size = next((tuple(mask.shape[-2:]) for mask in drawn if mask is not None), BOXES)
    length = next((len(mask) for mask in drawn if mask is not None and mask.dim() == 3), None)
    for r, (_, box) in enumerate(regions):
        if drawn[r] is None:
            drawn[r] = _box(f"{argument}[{r}]", box, size)
        if tuple(drawn[r].shape[-2:]) != size:
            rule = f"have a mask of the size {size} of the others"
            _checks.refuse(f"{argument}[{r}]", rule, tuple(drawn[r].shape[-2:]))
        if drawn[r].dim() == 3 and len(drawn[r]) != length:
            rule = f"have a mask of as many frames as the others, {length}"
            _checks.refuse(f"{argument}[{r}]", rule, len(drawn[r]))
        if length is not None:
            drawn[r] = drawn[r].expand(length, *size)
    phrases = [Phrase(phrase) if isinstance(phrase, str) else phrase for phrase, _ in regions]
    return Regions(phrases, torch.stack(drawn))


def _is_box(mask: object) -> bool:
    return isinstance(mask, (tuple, list))


def _box(argument: str, box: Any, size: tuple[int, int]) -> Tensor:
    with _checks.renamed({"boxes[0]": f"the box of {argument}"}):
        return Layout.from_boxes([tuple(box)], size).masks[0]


def _mask(argument: str, mask: Any, video: bool = False) -> Tensor:
    """A bool tensor [H, W] on the CPU, or [F, H, W] where it is of a video's frames."""
    light, none = "", "none"
    if hasattr(mask, "convert"):  # a PIL image
        light, none = " that is light and opaque", f"none in an image of mode {mask.mode}"
        mask = _pixels.mask(argument, mask)
    if isinstance(mask, np.ndarray):
        mask = torch.from_numpy(np.array(mask)) if mask.dtype == bool else mask
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        rule = "have a bool mask, a PIL image or a box (x0, y0, x1, y1)"
        _checks.refuse(argument, rule, _kind(mask), TypeError)
    _checks.readable(argument, mask, "a mask that can be looked at")
    if mask.dim() not in ((2, 3) if video else (2,)):
        rule = "have a mask of 2 dimensions [height, width]"
        rule += ", or of 3 [frames, height, width]" if video else ""
        _checks.refuse(argument, rule, tuple(mask.shape))
    if not mask.any():
        _checks.refuse(argument, f"have a mask of at least one pixel{light}", none)
    return mask.detach().cpu().clone()


def _kind(value: object) -> str:
    kind, dtype = type(value).__name__, getattr(value, "dtype", None)
    return kind if dtype is None else f"{kind} of {_checks.name(dtype)}"
