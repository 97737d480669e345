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
TENSORS = (*ARRAYS, "bfloat16")
VALUES = "hold floats in 0..1 or bytes"
FORMS = "be a list of PIL images, a tensor [F, 3, H, W], an array [F, H, W, 3], or a list of these"


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
        x = x.float() / 255 if x.dtype == torch.uint8 else check_values(x, VALUES)
    whole_frames(pipe, model, x.shape[1], "the number of frames of video")
    height, width = x.shape[3:]
    if not x.numel() or height % unit or width % unit:
        _checks.refuse("video", f"have sides of multiples of {unit}", f"{width} x {height}")
    return pipe.video_processor.preprocess_video(x).to(pipe._execution_device)


def _frames(video: Any, depth: int = 0) -> Tensor:
    """Frames [..., 3, H, W] of a video or several; `depth`: the lists that it is in."""
    if isinstance(video, (Tensor, np.ndarray)):
        return _numbers(video, depth)
    listed = isinstance(video, (list, tuple)) and len(video) > 0 and depth < 2
    pictured = [hasattr(one, "convert") for one in video] if listed else []
    if not listed or any(pictured) != all(pictured):
        _checks.refuse("video", FORMS, _said(video), TypeError)
    if all(pictured):
        return torch.from_numpy(np.stack(pictures(video, "video", 5 + depth))).movedim(-1, -3)
    found = []
    for one in video:  # a comprehension has a frame of its own, before Python 3.12
        found.append(_frames(one, depth + 1))
    if len({(frames.shape, frames.dtype) for frames in found}) > 1:
        kinds = " and ".join(dict.fromkeys(map(_said, video)))
        _checks.refuse("video", "hold frames of one shape and dtype", kinds)
    return torch.stack(found)


def _numbers(video: Tensor | np.ndarray, depth: int) -> Tensor:
    """Frames [..., 3, H, W] of a tensor, or of an array with the colours last."""
    array = isinstance(video, np.ndarray)
    if not array:
        _checks.readable("video", video)
    dtype = _dtype(video)
    if dtype not in (ARRAYS if array else TENSORS):
        _checks.refuse("video", VALUES, dtype, TypeError)
    axes, colours = ("H, W, 3", -1) if array else ("3, H, W", -3)
    most = 5 - depth
    if not max(most - 1, 3) <= video.ndim <= most or video.shape[colours] != 3 or 0 in video.shape:
        shapes = [f"({axes})", f"(F, {axes})", f"(B, F, {axes})"][max(1 - depth, 0) : 3 - depth]
        form = f"{'an array' if array else 'a tensor'}{' of a list' if depth else ''}"
        _checks.refuse("video", f"have shape {' or '.join(shapes)} as {form}", tuple(video.shape))
    if not array:
        return video
    return torch.from_numpy(video.astype(dtype, order="C")).movedim(-1, -3)  # in native bytes


def _dtype(video: Tensor | np.ndarray) -> str:
    return _checks.name(video.dtype) if isinstance(video, Tensor) else video.dtype.name


def _said(video: Any) -> str:
    """A video, or a part of one, in the words of who gave it."""
    if isinstance(video, (Tensor, np.ndarray)):
        return f"{_dtype(video)} {tuple(video.shape)}"
    if isinstance(video, (list, tuple)):
        kinds = ", ".join(dict.fromkeys(map(_said, video)))
        return f"a list of {len(video)}" + (f": {kinds}" if kinds else "")
    kind = type(video).__name__
    return f"{kind} {video.width} x {video.height}" if hasattr(video, "convert") else kind
