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
        """The frame of tokens of each of count frames, of the video or of its latents.

        Frames behind those that fill latents, which pipelines leave out, are behind all tokens;
        where tokens have several latents they may be those of a shorter video, and are refused.
        """
        lengths = [self.latents - ahead for ahead in range(self.each)]  # without those put before
        owned, length = list(range(count)), count
        if count not in lengths:
            owned = [-(-f // self.compression) for f in owned]
            length = (count - 1) // self.compression + 1
        behind = 0 if count in lengths else (count - 1) % self.compression
        if length in lengths and (self.each == 1 or not behind):
            return [(latent + self.latents - length) // self.each for latent in owned]
        frames = [(length - 1) * self.compression + 1 for length in lengths]
        videos, theirs = (" or ".join(map(str, reversed(each))) for each in (frames, lengths))
        rule = f"have masks of the video's {videos} frames or of the {theirs} of its latents"
        return _checks.refuse("regions", rule, count)


def masks_of_call(
    pipe: DiffusionPipeline, model: Model, call: Call, images: list[Image]
) -> list[Tensor]:
    """The masks of each image on the grid of a call's latents, bool [R, height, width].

    Those of a video are on the grids of its tokens, one frame below the other.
    """
    grid, device = model.grid(call), call.text.device
    if not model.video and model.length(call) == 1:
        return [resized(image.masks, grid).to(device) for image in images]
    tokens, video = tuple(side // model.patch for side in grid), video_of(pipe, model, call)
    return [_stacked(image.masks, tokens, video).to(device) for image in images]


def video_of(pipe: DiffusionPipeline, model: Model, call: Call) -> Video:
    """The frames of a call."""
    found = (getattr(pipe, name, None) for name in COMPRESSIONS)
    compression = next((int(factor) for factor in found if factor), 1)
    return Video(model.length(call), model.frames, compression)


def _stacked(masks: Tensor, grid: tuple[int, int], video: Video) -> Tensor:
    """Masks [R, H, W] or [R, F, H, W] on the grids of tokens, bool [R, frames * height, width]."""
    if masks.dim() == 3:
        return resized(masks, grid).repeat(1, video.tokens, 1)
    frames = of_tokens(masks, video)
    return resized(frames.flatten(0, 1), grid).view(len(masks), -1, grid[1])


def of_tokens(masks: Tensor, video: Video) -> Tensor:
    """Masks [R, F, H, W] of a video's frames as [R, frames of tokens, H, W].

    A frame of tokens has the masks in the middle of its frames; a region without a pixel there has
    in each all that it takes in its frames.
    """
    owners = torch.tensor(video.owners(masks.shape[1]), dtype=torch.int64, device="cpu")
    of_token = [masks[:, owners == t] for t in range(video.tokens)]  # [R, its frames, H, W]
    middle = torch.stack([own[:, own.shape[1] // 2] for own in of_token], 1)
    kept = middle.flatten(1).any(1)[:, None, None, None]
    return torch.where(kept, middle, torch.stack([own.amax(1) for own in of_token], 1))
