"""Videos as a pipeline's VAE takes them: which are, of how many frames and of which sides."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks

from ..models.record import Model
from .images import check_values, pictures
from .settings import is_whole

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

FACTORS = "vae_scale_factor_temporal", "vae_temporal_compression_ratio"
ARRAYS = "uint8", "float16", "float32", "float64"


def makes_videos(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline's call makes videos."""
    return "num_frames" in inspect.signature(type(pipe).__call__).parameters


def factor(pipe: DiffusionPipeline) -> int:
    """Frames of a latent, of which the first is one alone."""
    return next(getattr(pipe, name) for name in FACTORS if hasattr(pipe, name))


def whole_frames(
    pipe: DiffusionPipeline, model: Model, number: Any, argument: str = "num_frames"
) -> int:
    """A number of frames that its VAE decodes to as many; None for the pipeline's own."""
    if number is None:
        number = inspect.signature(type(pipe).__call__).parameters["num_frames"].default
        number = number or pipe.transformer.config.sample_frames  # CogVideoX's
    unit = factor(pipe) * model.lengths
    if not is_whole(number) or number < 1 or (number - 1) % unit:
        _checks.refuse(argument, f"be 1 above a multiple of {unit}", repr(number))
    return int(number)


def pixels_of(pipe: DiffusionPipeline, model: Model, videos: Any, unit: int) -> Tensor:
    """The pixels [B, 3, F, H, W] in -1..1 of one video or several.

    Args:
        pipe, model: a pipeline and its record.
        videos: tensors [F, 3, H, W] or [B, F, 3, H, W], arrays with the colours last, of floats in
            0..1 or of bytes, PIL images, or lists of these.
        unit: what their sides are multiples of.
    """
    with _checks.renamed({"image": "video"}):
        x = _frames(videos)
        x = x.unsqueeze(0) if x.dim() == 4 else x
        if x.dim() != 5 or x.shape[2] != 3 or not x.numel():
            rule = "have shape (F, 3, H, W) or (B, F, 3, H, W), arrays with the colours last"
            _checks.refuse("video", rule, f"frames of shape {tuple(x.shape[-3:])}")
        x = x.float() / 255 if x.dtype == torch.uint8 else check_values(x)
    whole_frames(pipe, model, x.shape[1], "the number of frames of video")
    height, width = x.shape[3:]
    if height % unit or width % unit:
        _checks.refuse("video", f"have sides of multiples of {unit}", f"{width} x {height}")
    return pipe.video_processor.preprocess_video(x).to(pipe._execution_device)


def _frames(videos: Any) -> Tensor:
    """Frames [..., 3, H, W] as they come: tensors, arrays, pictures, or lists of these."""
    if isinstance(videos, Tensor):
        return videos
    if isinstance(videos, np.ndarray) and videos.ndim > 2 and videos.dtype.name in ARRAYS:
        return torch.from_numpy(videos.copy()).movedim(-1, -3)
    if not isinstance(videos, (list, tuple)) or not videos:
        rule = "be PIL images, a tensor, or an array of floats or bytes [F, H, W, 3]"
        got = f"{videos.dtype.name} {videos.shape}" if hasattr(videos, "dtype") else repr(videos)
        _checks.refuse("video", rule, got, TypeError)
    if hasattr(videos[0], "convert"):
        return torch.from_numpy(np.stack(pictures(videos))).movedim(-1, -3)
    found = [_frames(video) for video in videos]
    if len({(frames.shape, frames.dtype) for frames in found}) > 1:
        shapes = dict.fromkeys(str(tuple(frames.shape)) for frames in found)
        _checks.refuse("video", "hold frames of one shape and dtype", " and ".join(shapes))
    return torch.stack(found)
