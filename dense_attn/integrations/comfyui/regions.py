"""A user's masks and conditionings, checked, as texts and masks of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dense_attn import _checks

MOST = 30  # regions: the prompt and the image have bits beside theirs


@dataclass(frozen=True, eq=False)
class Region:
    """A part of an image and what it shows, as ComfyUI has them.

    Args:
        mask: a MASK, floats in 0..1 [H, W] or [B, H, W], one for all images or one for each.
        conditioning: a CONDITIONING of one text, `[[tokens [1, T, C], {...}]]`, by the encoder of
            the prompt; the rest of it is not used.
        weight: in `apply_region_prompts`, its share where regions overlap, beside their weights.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Example:
        >>> import torch
        >>> from dense_attn.integrations.comfyui import Region
        >>> left = torch.zeros(64, 64)
        >>> left[:, :32] = 1
        >>> Region(left, [[torch.randn(1, 77, 768), {}]]).tokens.shape
        torch.Size([1, 77, 768])
    """

    mask: Tensor
    conditioning: list[Any]
    weight: float = 1.0

    def __post_init__(self) -> None:
        mask = _checks.readable("mask", self.mask)
        if not (mask.is_floating_point() or mask.dtype == torch.bool):
            _checks.refuse("mask", "hold floats", _checks.name(mask.dtype), TypeError)
        if mask.dim() not in (2, 3) or not mask.numel():
            rule = "have shape [height, width] or [images, height, width]"
            _checks.refuse("mask", rule, tuple(mask.shape))
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            _checks.refuse("mask", "hold values in 0..1", "others")
        self.check_pixels(0)
        if _checks.number("weight", self.weight, torch.float32) <= 0:
            _checks.refuse("weight", "be above 0", self.weight)
        _tokens("conditioning", self.conditioning)

    def check_pixels(self, level: float) -> None:
        """Require a pixel above a level in the mask of each image."""
        if not (self.masks > level).flatten(1).any(1).all():
            _checks.refuse("mask", f"have a pixel above {level} in each image", "none")

    @property
    def masks(self) -> Tensor:
        """The masks of one image or of each, float32 [P, H, W] on the CPU."""
        mask = self.mask.detach().to("cpu", torch.float32)
        return mask[None] if mask.dim() == 2 else mask

    @property
    def tokens(self) -> Tensor:
        """The tokens of its text, [1, T, C]."""
        return _tokens("conditioning", self.conditioning)


def _tokens(argument: str, conditioning: object) -> Tensor:
    """The tokens [1, T, C] of a conditioning of one text."""
    if not isinstance(conditioning, list) or len(conditioning) != 1:
        got = len(conditioning) if isinstance(conditioning, list) else type(conditioning).__name__
        _checks.refuse(argument, "hold one text (not a combination of several)", got)
    (text,) = conditioning
    if not (isinstance(text, (list, tuple)) and len(text) == 2 and isinstance(text[1], dict)):
        got = f"[{type(text).__name__}]"
        _checks.refuse(argument, "be [[tokens, {...}]] of one text", got, TypeError)
    tokens = _checks.tensor(argument, text[0])
    if tokens.dim() != 3 or len(tokens) != 1 or not tokens.numel():
        rule = "hold tokens [1, number, channels], at least one"
        _checks.refuse(argument, rule, tuple(tokens.shape))
    if not tokens.is_floating_point():
        _checks.refuse(argument, "hold tokens of floats", _checks.name(tokens.dtype), TypeError)
    return tokens


def checked(regions: object) -> list[Region]:
    """Require a list of regions whose masks are for the same images."""
    if not isinstance(regions, Sequence) or not all(isinstance(one, Region) for one in regions):
        _checks.refuse("regions", "be a list of Region", type(regions).__name__, TypeError)
    if not 1 <= len(regions) <= MOST:
        _checks.refuse("regions", f"hold 1 to {MOST} regions", len(regions))
    counts = {len(region.masks) for region in regions} - {1}
    if len(counts) > 1:
        _checks.refuse("regions", "have masks of as many images or of one", sorted(counts))
    return list(regions)


def of_images(regions: list[Region]) -> list[Tensor]:
    """The masks of each image, float32 [R, H, W], on the grid of the largest height and width."""
    masks = [region.masks for region in regions]
    size = tuple(max(mask.shape[axis] for mask in masks) for axis in (1, 2))
    masks = [
        mask if mask.shape[1:] == size else interpolate(mask[None], size, mode="nearest")[0]
        for mask in masks
    ]
    images = max(map(len, masks))
    return list(torch.stack([mask.expand(images, *size) for mask in masks], 1))
