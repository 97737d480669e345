"""Parts that invert, reconstruct and optimize share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dense_attn import _checks, _memory

from ..hooks import unwrapped
from ..models import model_of
from . import rehearsed, stable_diffusion
from .autoencoder import decoded
from .chain import Chain
from .videos import makes_videos

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OUTPUTS = ("pil", "pt", "np", "latent")
Result = TypeVar("Result")


def check_pipe(pipe: DiffusionPipeline, *, pictures: bool = True) -> int | None:
    """Refuse pipelines that are no chain.

    Returns:
        What the sides of images are to be multiples of; None for Stable Diffusion 1 and 2.
    """
    if stable_diffusion.is_stable_diffusion(pipe):
        stable_diffusion.check_pipe(pipe, pictures=pictures)
        return None
    return rehearsed.check_pipe(pipe, pictures=pictures)


def denoiser_of(pipe: DiffusionPipeline) -> str:
    """The kind of a pipeline's denoiser, with what a U-Net is told beside the text."""
    unet = unwrapped(getattr(pipe, "unet", None))
    if unet is None:
        return model_of(pipe).denoiser
    told = unet.config.addition_embed_type
    return type(unet).__name__ + (f" ({told})" if told else "")


def images_of(
    pipe: DiffusionPipeline, chain: Chain | rehearsed.Rehearsed, x: Tensor, output_type: str
) -> Any:
    """The images of latents, or the videos, as pipelines return them."""
    if output_type == "latent":
        return x
    images = decoded(pipe, chain.model, x, chain.grid)
    if not images.isfinite().all():
        got = f"nan or inf in {_checks.name(unwrapped(pipe.vae).dtype)}"
        _checks.refuse("pipe", "have a VAE that makes finite images of latents", got)
    if makes_videos(pipe):
        return pipe.video_processor.postprocess_video(images.transpose(1, 2), output_type)
    return pipe.image_processor.postprocess(images, output_type=output_type)


def measured(call: Callable[[], Result], device: torch.device) -> tuple[Result, float, int | None]:
    """A call's result, its wall time and the memory that it adds at its peak."""
    start = time.perf_counter()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak, result = _memory.peak_extra_bytes(call)
    return result, time.perf_counter() - start, peak
