"""Masks of a video: which of their frames stand for those of its tokens, and all as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

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
    asked: int | None = None  # frames that the pipeline's call asks for, where it says

    @property
    def tokens(self) -> int:
        """The frames of tokens."""
        return self.latents // self.each

    @property
    def ahead(self) -> int:
        """Latents that the pipeline puts before a video's own, to fill tokens."""
        return 0 if self.asked is None else -latents_of(self.asked, self.compression) % self.each

    def owners(self, count: int) -> list[int]:
        """The frame of tokens of each of count frames, of the video or of its latents.

        Frames behind those that fill latents, which pipelines leave out, are behind all tokens.
        """
        own = self.latents - self.ahead
        whole = (own - 1) * self.compression + 1
        cut = range(whole, whole + self.compression)  # of each a pipeline makes this video
        named = {whole, self.asked}.intersection(cut)
        if count != own and count not in (cut if self.asked is None else named):
            videos = " or ".join(map(str, sorted(named)))
            rule = f"have masks of the video's {videos} frames or of the {own} of its latents"
            _checks.refuse("regions", rule, count)
        each = 1 if count == own else self.compression
        return [(-(-frame // each) + self.ahead) // self.each for frame in range(count)]


def latents_of(frames: int, compression: int) -> int:
    """The latents of a video's frames, without those that fill none."""
    return (frames - 1) // compression + 1


def asked_of(pipe: DiffusionPipeline, given: dict[str, Any]) -> int | None:
    """The frames that a call of the pipeline asks for; None where it does not say."""
    if "num_frames" not in given:
        return None
    config = getattr(getattr(pipe, "transformer", None), "config", None)
    frames = given["num_frames"] or getattr(config, "sample_frames", None)  # CogVideoX's own
    return frames if isinstance(frames, int) and frames > 0 else None


def check_call(
    pipe: DiffusionPipeline, model: Model, given: dict[str, Any], masks: list[Tensor]
) -> None:
    """Refuse masks of other frames than a pipeline's call will have, where that is known."""
    asked, compression = asked_of(pipe, given), _compression(pipe)
    if not asked or given.get("latents") is not None or asked % compression == 0:
        return  # some pipelines round such a number up, others down: the denoiser's call tells
    own = latents_of(asked, compression)
    video = Video(own + -own % model.frames, model.frames, compression, asked)
    for each in masks:
        if each.dim() == 4:
            video.owners(each.shape[1])


def masks_of_call(
    pipe: DiffusionPipeline, model: Model, call: Call, images: list[Image], asked: int | None
) -> list[Tensor]:
    """The masks of each image on the grid of a call's latents, bool [R, height, width].

    Those of a video, of whose frames the pipeline's call `asked` for so many, are on the grids of
    its tokens, one frame below the other.
    """
    grid, device = model.grid(call), call.text.device
    if not model.video and model.length(call) == 1:
        return [resized(image.masks, grid).to(device) for image in images]
    tokens, video = tuple(side // model.patch for side in grid), video_of(pipe, model, call, asked)
    return [_stacked(image.masks, tokens, video).to(device) for image in images]


def video_of(pipe: DiffusionPipeline, model: Model, call: Call, asked: int | None) -> Video:
    """The frames of a call."""
    return Video(model.length(call), model.frames, _compression(pipe), asked)


def _compression(pipe: DiffusionPipeline) -> int:
    """The frames in latents."""
    found = (getattr(pipe, name, None) for name in COMPRESSIONS)
    return next((int(factor) for factor in found if factor), 1)


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
