"""optimize: the image of noise that was changed until a loss fell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks, optimize_latents
from dense_attn.optimize.loop import OptimizeResult

from ..models import model_of
from . import videos
from .autoencoder import decoded, upcast
from .chain import Chain
from .rehearsed import Rehearsed, packs, size_of
from .settings import Settings, in_words, sides
from .shared import OUTPUTS, check_pipe, images_of, measured
from .stable_diffusion import noise_shape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Optimized:
    """Images of optimised noise.

    Attributes:
        images: a list of PIL images, or what `output_type` says.
        result: of `optimize_latents`: latents, losses, and the state to go on from.
        seconds: wall time.
        peak_bytes: as in `Inversion`.
    """

    images: Any
    result: OptimizeResult
    seconds: float
    peak_bytes: int | None


def optimize(
    pipe: DiffusionPipeline,
    prompt: str | list[str],
    loss_fn: Callable[[Tensor], Tensor],
    saliency_fn: Callable[[Tensor], Tensor] | None = None,
    *,
    negative_prompt: str | list[str] = "",
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    latents: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    num_frames: int | None = None,
    generator: torch.Generator | None = None,
    output_type: str = "pil",
    sampler: dict[str, Any] | None = None,
    call: dict[str, Any] | None = None,
    **options: Any,
) -> Optimized:
    """The image of a prompt whose noise was changed until a loss fell: DOODL, with saliency SGOOL.

    `optimize_latents` on the pipeline's denoiser and VAE: gradients of
    `loss_fn(image) + w*loss_fn(salient crop)` go through the decoder and all steps of the chain, in
    memory that does not grow with them.

    Args:
        pipe: as `invert` takes it.
        prompt, negative_prompt: one for all images or one for each.
        loss_fn: images [B, 3, H, W], or videos [B, F, 3, H, W], in -1..1 to a scalar tensor.
        saliency_fn: None, or images in 0..1 to maps [B, H, W] in 0..1
            (`spectral_residual_saliency`); of videos all frames are images, [B*F, 3, H, W].
        num_inference_steps: of the chain.
        guidance_scale: as in `invert`; None for no guidance.
        latents: the noise to begin with, of variance 1, as the pipeline's loop has it; None: what
            the pipeline draws for images of height x width.
        height, width: in pixels, multiples of a token's; the size of latents, or the pipeline's
            own, when None. Packed latents (FLUX, Qwen-Image, LTX) tell no size and need both.
        num_frames: of videos, as height and width.
        generator: of the noise.
        output_type: as in `reconstruct`.
        sampler, call: further arguments of `ReversibleSampler`, and of the pipeline's call.
        options: further arguments of `optimize_latents`: steps, salient_weight, clip, momentum,
            noise, progress, state.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Source: Wallace et al., DOODL, ICCV 2023; Wang et al., SGOOL, 2024.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import optimize
        >>> pipe = tiny_pipeline(StableDiffusionPipeline)
        >>> options = {"num_inference_steps": 2, "steps": 2, "progress": False}
        >>> darker = optimize(pipe, "a cat", lambda x: x.mean(), **options)
        >>> darker.images[0].size, len(darker.result.losses)
        ((16, 16), 2)
    """
    unit = check_pipe(pipe, pictures=output_type != "latent")
    size = sides(unit or pipe.vae_scale_factor, height, width)
    _checks.choice("output_type", output_type, OUTPUTS)
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        _checks.refuse("generator", "be a torch.Generator or None", got, TypeError)
    count = 1 if isinstance(prompt, str) or not isinstance(prompt, list) else len(prompt)
    given = sampler or {}, call or {}
    settings = Settings(
        prompt, negative_prompt, guidance_scale, num_inference_steps, *given, size, num_frames
    )
    many = unit is not None and videos.makes_videos(pipe)
    if num_frames is not None and not many:
        _checks.refuse("num_frames", "be None where pipe makes images", repr(num_frames))
    if unit is None:
        chain, latents = _of_stable_diffusion(pipe, settings, count, latents, generator)
    else:
        chain, latents = _of_rehearsal(pipe, settings, count, latents, generator)

    def run() -> OptimizeResult:
        return optimize_latents(
            chain.sampler,
            chain.eps,
            partial(_pictures, pipe, chain),
            _users(loss_fn, count if many else 0),
            latents,
            saliency_fn=_users(saliency_fn),
            generator=generator,
            **options,
        )

    own = "the chain of pipe, num_inference_steps and sampler"
    with in_words(pipe, x="latents", sampler=own):
        with upcast(pipe, chain.model):
            result, seconds, peak = measured(run, latents.device)
        try:
            images = _drawn(pipe, chain, result, output_type)
        except ValueError as error:
            error.result = result  # the state to go on from
            raise
    return Optimized(images, result, seconds, peak)


def _pictures(pipe: DiffusionPipeline, chain: Chain | Rehearsed, x: Tensor) -> Tensor:
    """The images [B, 3, H, W] of latents, or all frames of their videos."""
    return decoded(pipe, chain.model, x, chain.grid).flatten(0, -4)


@torch.no_grad()
def _drawn(
    pipe: DiffusionPipeline, chain: Chain | Rehearsed, result: OptimizeResult, output_type: str
) -> Any:
    """The images of optimised noise."""
    pair = result.latents if isinstance(result.latents, tuple) else (result.latents,)
    return images_of(pipe, chain, chain.sampler.sample(chain.eps, *pair)[0], output_type)


def _of_stable_diffusion(
    pipe: DiffusionPipeline,
    settings: Settings,
    count: int,
    latents: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Chain, Tensor]:
    """A chain of Stable Diffusion 1 or 2, and the noise to begin with."""
    from diffusers.utils.torch_utils import randn_tensor

    shape = noise_shape(pipe, count, *settings.size, latents)
    if settings.guidance_scale is None:
        settings = replace(settings, guidance_scale=1.0)
    chain = Chain(pipe, replace(settings, size=(None, None)), count)
    if latents is None:
        latents = randn_tensor(shape, generator, pipe._execution_device, torch.float32)
    return chain, latents


def _of_rehearsal(
    pipe: DiffusionPipeline,
    settings: Settings,
    count: int,
    latents: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Rehearsed, Tensor]:
    """A chain of another pipeline, and the noise to begin with, which it draws itself."""
    if latents is not None:
        generator = torch.Generator()  # of noise that nothing is done with
        frames, *own = size_of(pipe, _checks.floats("latents", latents))
        settings = replace(
            settings,
            size=tuple(a or b for a, b in zip(settings.size, own)),
            frames=settings.frames or frames,
        )
        told = dict(zip(("height", "width"), settings.size))
        told |= {"num_frames": settings.frames} if videos.makes_videos(pipe) else {}
        for argument, side in told.items():
            if side is None and latents.dim() == 3 and packs(pipe):
                rule = "be given with packed latents, which do not tell it"
                _checks.refuse(argument, rule, side)
    if videos.makes_videos(pipe):
        frames = videos.whole_frames(pipe, model_of(pipe), settings.frames)
        settings = replace(settings, frames=frames)
    with in_words(pipe):
        chain = Rehearsed(pipe, settings, count, generator, guided=False)
    if latents is None:
        return chain, chain.latents
    chain.check("latents", latents)
    return chain, latents


def _users(function: Any, count: int = 0) -> Any:
    """A user's function, of so many videos or of images; its refusals are in its own words."""

    def called(image: Tensor) -> Tensor:
        with _checks.not_renamed():
            return function(image.unflatten(0, (count, -1)) if count else image)

    return called if callable(function) else function
