"""Pixels to the latents of a pipeline's loop and back, as its VAE and its record have them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dense_attn import _checks

from ..hooks import unwrapped
from ..models.record import Model
from .videos import makes_videos

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Affine = tuple[float | Tensor, float | Tensor]


@contextmanager
def upcast(pipe: DiffusionPipeline, model: Model) -> Iterator[None]:
    """Inside the block, gradients included, a VAE that overflows in half precision is in float32.

    Where its config says so (force_upcast) and the pipeline's own call heeds it.
    """
    vae = unwrapped(getattr(pipe, "vae", None))
    told = model.upcasts and vae is not None and vae.config.get("force_upcast")
    if not told or vae.dtype != torch.float16:
        yield
        return
    with torch.inference_mode(False):  # its parameters would stay without gradients
        vae.to(torch.float32)
    try:
        yield
    finally:
        with torch.inference_mode(False):
            vae.to(torch.float16)


def encoded(pipe: DiffusionPipeline, model: Model, pixels: Tensor) -> Tensor:
    """The latents of pixels [B, 3, H, W], or [B, 3, F, H, W], in -1..1, without noise."""
    vae = unwrapped(pipe.vae)
    one = pixels.dim() == 4 and _of_videos(vae)  # frame
    with upcast(pipe, model):
        pixels = pixels.to(vae.dtype)
        made = pipe.vae.encode(pixels.unsqueeze(2) if one else pixels)
    if hasattr(made, "latent_dist"):
        x = made.latent_dist.mode()
    else:  # AutoencoderTiny and AutoencoderDC, which draw nothing
        x = made.latents if hasattr(made, "latents") else made.latent
    shift, scale = _affine(vae, model, x)
    x = (x - shift) * scale
    x = x.squeeze(2) if one else x
    x = model.arranged(x)
    if hasattr(vae, "bn"):
        mean, deviation = _of_tokens(vae, x)
        x = (x - mean) / deviation
    if not x.isfinite().all():
        rule = "have a VAE that makes finite latents of image"
        _checks.refuse("pipe", rule, f"nan or inf in {_checks.name(vae.dtype)}")
    return x


def decoded(pipe: DiffusionPipeline, model: Model, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The images [B, 3, H, W] of latents, or the videos [B, F, 3, H, W], in -1..1."""
    with upcast(pipe, model):
        return _decoded(pipe, model, x.to(unwrapped(pipe.vae).dtype), grid)


def _decoded(pipe: DiffusionPipeline, model: Model, x: Tensor, grid: tuple[int, int]) -> Tensor:
    vae = unwrapped(pipe.vae)
    if hasattr(vae, "bn"):
        mean, deviation = _of_tokens(vae, x)
        x = x * deviation + mean
    x = model.pictured(x, grid)
    if _of_videos(vae) != (x.dim() == 5):  # an image is one frame, of either
        x = x.squeeze(2) if x.dim() == 5 else x.unsqueeze(2)
    shift, scale = _affine(vae, model, x)
    made = pipe.vae.decode(x / scale + shift, *_time(vae, x)).sample.float()
    if makes_videos(pipe):
        return made.transpose(1, 2)
    return made.squeeze(2) if made.dim() == 5 else made


def _time(vae: torch.nn.Module, like: Tensor) -> tuple[Tensor, ...]:
    """The time that some of LTX's VAEs are told, at which pipelines add no noise."""
    return (like.new_zeros(len(like)),) if vae.config.get("timestep_conditioning") else ()


def _affine(vae: torch.nn.Module, model: Model, like: Tensor) -> Affine:
    """The shift of a VAE's latents [B, C, ...], and the scale of the rest."""
    known = {**vae.config, **dict(vae.named_buffers(recurse=False))}  # LTX's has learned them
    scale = known.get("scaling_factor") or 1.0
    mean, deviation = known.get("latents_mean"), known.get("latents_std")
    if mean is not None and deviation is not None:
        mean, deviation = (
            torch.as_tensor(numbers, dtype=like.dtype, device=like.device).view(
                1, -1, *(1,) * (like.dim() - 2)
            )
            for numbers in (mean, deviation)
        )
        return mean, scale / deviation
    return (known.get("shift_factor") or 0.0) if model.shifts else 0.0, scale


def _of_tokens(vae: torch.nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the tokens of FLUX.2's VAE, which has learned them."""
    variance = vae.bn.running_var + vae.config.batch_norm_eps
    return vae.bn.running_mean.to(like), variance.sqrt().to(like)


def _of_videos(vae: torch.nn.Module) -> bool:
    """Whether a VAE takes images as videos of one frame, as Qwen-Image's does."""
    return any(isinstance(module, torch.nn.Conv3d) for module in vae.modules())
