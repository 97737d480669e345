"""Masks of a video: which of their frames stand for those of its tokens, and all as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention.layout import resized

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Call, Model
    from ..state import Image

# the names that pipelines have for the frames of a video in one of its latents
COMPRESSIONS = "vae_scale_factor_temporal", "vae_temporal_compression_ratio"


class Video(NamedTuple):
    """The frames of a denoiser's call."""

    latents: int
    each: int = 1  # latents in a token
    compression: int = 1  # frames in latents, but for the first, which has one

    @property
    def tokens(self) -> int:
        """The frames of tokens."""
        return self.latents // self.each

    def owners(self, count: int) -> list[int]:
        """The frame of tokens of each of count frames, of the video or of its latents."""
        of_pixels = [-(-f // self.compression) for f in range(count)]
        whole = (count - 1) // self.compression + 1
        for length, latents in ((whole, of_pixels), (count, list(range(count)))):
            ahead = self.latents - length  # frames that a pipeline puts before a video
            if 0 <= ahead < self.each:
                return [min((f + ahead) // self.each, self.tokens - 1) for f in latents]
        frames = (self.latents - 1) * self.compression + 1
        rule = f"have masks of the video's {frames} frames or of the {self.latents} of its latents"
        return _checks.refuse("regions", rule, count)


def masks_of_call(
    pipe: DiffusionPipeline, model: Model, call: Call, images: list[Image]
) -> list[Tensor]:
    """The masks of each image on the grid of a call's latents, bool [R, height, width].

    Those of a video are on the grids of its tokens, one frame below the other.
    """
    grid, device = model.grid(call), call.text.device
    if not model.video:
        return [resized(image.masks, grid).to(device) for image in images]
    found = (getattr(pipe, name, None) for name in COMPRESSIONS)
    compression = next((int(factor) for factor in found if factor), 1)
    video = Video(model.length(call), model.frames, compression)
    tokens = tuple(side // model.patch for side in grid)
    return [_stacked(image.masks, (grid, tokens), video).to(device) for image in images]


def _stacked(masks: Tensor, grids: tuple[tuple[int, int], ...], video: Video) -> Tensor:
    """Masks [R, H, W] or [R, F, H, W] on one grid, then on the next, [R, frames * height, width].

    A frame of tokens has the masks in the middle of its frames; a region without a pixel there has
    in each all that it takes in its frames.
    """
    frames = masks if masks.dim() == 4 else masks[:, None]
    if masks.dim() == 4:
        owners = torch.tensor(video.owners(masks.shape[1]), dtype=torch.int64, device="cpu")
        of_token = [masks[:, owners == t] for t in range(video.tokens)]  # [R, its frames, H, W]
        middle = torch.stack([own[:, own.shape[1] // 2] for own in of_token], 1)
        kept = middle.flatten(1).any(1)[:, None, None, None]
        frames = torch.where(kept, middle, torch.stack([own.any(1) for own in of_token], 1))
    flat = frames.flatten(0, 1)
    for grid in grids:
        flat = resized(flat, grid)
    stacked = flat.view(len(masks), -1, grids[-1][1])
    return stacked if masks.dim() == 4 else stacked.repeat(1, video.tokens, 1)
