"""The image's tokens of a call, and how the regions of each image share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..regions.frames import of_tokens, video_of
from .sharing import areas_of, members, with_base

if TYPE_CHECKING:
    from ..models.record import Call, Model
    from .options import Options
    from .reading import RegionReading
    from .region import Regions


@dataclass(eq=False)
class ImageTokens:
    """The image's tokens of calls with one grid of latents."""

    model: Model
    reading: RegionReading
    options: Options
    call: Call  # one of them
    asked: int | None  # frames of the video that the pipeline's call asks for

    @property
    def frames(self) -> int:
        """The frames of tokens of a video; an image has one."""
        return self.model.length(self.call) // self.model.frames

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of a frame's tokens, and after each halving of the grid."""
        height, width = (side // self.model.patch for side in self.model.grid(self.call))
        found = [(height, width)]
        for _ in range(getattr(self.model, "deepest", 0)):
            height, width = (height + 1) // 2, (width + 1) // 2
            found.append((height, width))
        return found

    def own(self, size: tuple[int, int]) -> list[Tensor]:
        """Shares of the regions of each image alone, [1 + R, frames * height * width]."""
        return [self._members(image, size) for image in self.reading.images_of]

    def shares(self, own: list[Tensor], positive: bool) -> list[Tensor]:
        """Shares of the prompts, or negative prompts, that there are; the call's comes first."""
        ratio, given = self.options.base_ratio, self.reading.given(positive)
        return [with_base(image, ratio, row) for image, row in zip(own, given)]

    def areas(self, size: tuple[int, int]) -> list[Tensor]:
        """The part of all tokens that each region covers, [R] of each image."""
        return [areas_of(self._masks(image), size) for image in self.reading.images_of]

    @cached_property
    def sees_first(self) -> dict[bool, list[bool]]:
        """Whether any token of each image sees the call's prompt, and its negative prompt."""
        own = [self.own(size) for size in self.sizes]
        return {
            positive: [
                any(bool((shares[0] > 0).any()) for shares in sizes)
                for sizes in zip(*(self.shares(each, positive) for each in own))
            ]
            for positive in (True, False)
        }

    def _masks(self, image: Regions) -> Tensor:
        """Masks of each frame of tokens, [R, frames, H, W]; one where all have the same."""
        if image.masks.dim() == 3:
            return image.masks[:, None]
        video = video_of(self.reading.pipe, self.model, self.call, self.asked)
        return of_tokens(image.masks, video)

    def _members(self, image: Regions, size: tuple[int, int]) -> Tensor:
        """Shares of all tokens, [1 + R, frames * height * width], one frame after the other."""
        frames = self._masks(image).unbind(1)
        found = [members(masks, image.weights, size, self.reading.base) for masks in frames]
        return torch.cat(found * (self.frames // len(found)), 1)
