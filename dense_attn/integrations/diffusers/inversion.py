"""invert, reconstruct and optimize: reversible sampling of a Stable Diffusion pipeline's images."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from dense_attn import _checks, _memory, optimize_latents
from dense_attn.optimize.loop import OptimizeResult

from .chain import Chain, Settings, in_words
from .hooks import unwrapped
from .images import check_images, pixels_of
from .pipes import check_noise, check_pipe, noise_shape

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

OUTPUTS = ("pil", "pt", "np", "latent")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Inversion:
    """The noise of an image, and what it took to find it.

    Attributes:
        latents: the pair of latents at the noise end, in float64 where the chain is exact.
        settings: those of the way back.
        seconds: wall time.
        peak_bytes: what was added to the memory in use at the peak; None where the system does not
            tell.
    """

    latents: tuple[Tensor, Tensor]
    settings: Settings
    seconds: float
    peak_bytes: int | None


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


def invert(
    pipe: DiffusionPipeline,
    image: Any,
    prompt: str | list[str],
    *,
    negative_prompt: str | list[str] = "",
    num_inference_steps: int = 50,
    guidance_scale: float = 3.0,
    progress: bool = False,
    **sampler: Any,
) -> Inversion:
    """The noise of an image, from which `reconstruct` makes the image again, or an edit of it.

    The image is encoded, `z = scaling * vae(image)`, and `ReversibleSampler.invert` takes z to the
    noise; with exact chains, the default, the way back ends in the very bits of z.

    Args:
        pipe: a Stable Diffusion 1 or 2 pipeline with any scheduler of its noise schedule that
            leaves signal at the first timestep. Its U-Net takes latents, a timestep and a text
            alone: no channels of a mask or depth, no class labels, no embedding of the guidance
            scale (LCM). A ControlNet or adapter beside it is not called.
        image: a PIL image, a list of them of one size, or a tensor [B, 3, H, W] in 0..1. A warning
            says where it is resized, to multiples of the VAE's factor, and where transparent pixels
            are taken as opaque.
        prompt, negative_prompt: what the image shows, and what it does not; one for all images or
            one for each.
        num_inference_steps: of the chain.
        guidance_scale: classifier-free guidance; 1 for none. Large ones drive EDICT's pair apart.
        progress: show a bar.
        sampler: further arguments of `ReversibleSampler`: method, mix, gamma, alternate, exact,
            backend.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; a chain whose
            integers would not fit.

    Source: Wallace et al., EDICT: Exact Diffusion Inversion via Coupled Transformations, CVPR 2023.

    Example:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import invert, reconstruct
        >>> pipe = tiny_pipeline(StableDiffusionPipeline)
        >>> inversion = invert(pipe, torch.rand(1, 3, 16, 16), "a cat", num_inference_steps=4)
        >>> edited = reconstruct(pipe, inversion, prompt="a dog")[0]
    """
    check_pipe(pipe)
    image = check_images(pipe, image)
    settings = Settings(prompt, negative_prompt, guidance_scale, num_inference_steps, sampler)
    with in_words(sampler="a further argument"):
        chain = Chain(pipe, settings, len(image))
    with torch.no_grad(), in_words(x="the latents of image"):
        x = _encoded(pipe, pixels_of(pipe, image))
        call = partial(chain.sampler.invert, chain.eps, x, progress=progress)
        latents, seconds, peak = measured(call, x.device)
    return Inversion(latents, chain.settings, seconds, peak)


@torch.no_grad()
def reconstruct(
    pipe: DiffusionPipeline,
    inversion: Inversion,
    prompt: str | list[str] | None = None,
    *,
    output_type: str = "pil",
    progress: bool = False,
) -> Any:
    """The image of an inversion, or, with another prompt, an edit of it.

    Args:
        pipe: the pipeline of the inversion.
        inversion: what `invert` returned.
        prompt: None for that of the inversion.
        output_type: "pil", "pt", "np" or "latent", as pipelines have it.
        progress: show a bar.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Source: Wallace et al., EDICT: Exact Diffusion Inversion via Coupled Transformations, CVPR 2023.

    Example:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import invert, reconstruct
        >>> pipe = tiny_pipeline(StableDiffusionPipeline)
        >>> inversion = invert(pipe, torch.rand(1, 3, 16, 16), "a cat", num_inference_steps=4)
        >>> reconstruct(pipe, inversion)[0].size
        (16, 16)
    """
    check_pipe(pipe, pictures=output_type != "latent")
    if not isinstance(inversion, Inversion):
        _checks.refuse("inversion", "be what invert returns", type(inversion).__name__, TypeError)
    _checks.choice("output_type", output_type, OUTPUTS)
    for latents in inversion.latents:
        check_noise(pipe, "the latents of inversion", latents)
    settings = inversion.settings if prompt is None else replace(inversion.settings, prompt=prompt)
    chain = Chain(pipe, settings, len(inversion.latents[0]))
    with in_words(x="the latents of inversion", y="the latents of inversion"):
        x, _ = chain.sampler.sample(chain.eps, *inversion.latents, progress=progress)
    return _images(pipe, x, output_type)


def optimize(
    pipe: DiffusionPipeline,
    prompt: str | list[str],
    loss_fn: Callable[[Tensor], Tensor],
    saliency_fn: Callable[[Tensor], Tensor] | None = None,
    *,
    negative_prompt: str | list[str] = "",
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    latents: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    generator: torch.Generator | None = None,
    output_type: str = "pil",
    sampler: dict[str, Any] | None = None,
    **options: Any,
) -> Optimized:
    """The image of a prompt whose noise was changed until a loss fell: DOODL, with saliency SGOOL.

    `optimize_latents` on the pipeline's U-Net and VAE: gradients of
    `loss_fn(image) + w*loss_fn(salient crop)` go through the decoder and all steps of the chain, in
    memory that does not grow with them.

    Args:
        pipe: a Stable Diffusion 1 or 2 pipeline, as `invert` takes it.
        prompt, negative_prompt: one for all images or one for each.
        loss_fn: images [B, 3, H, W] in -1..1 to a scalar tensor.
        saliency_fn: None, or images in 0..1 to maps [B, H, W] in 0..1
            (`spectral_residual_saliency`).
        num_inference_steps, guidance_scale: of the chain.
        latents: the noise to begin with, of variance 1; drawn when None, for images of height x
            width.
        height, width: in pixels; the size of latents, or the U-Net's own, when None.
        generator: of the noise.
        output_type: as in `reconstruct`.
        sampler: further arguments of `ReversibleSampler`.
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
    from diffusers.utils.torch_utils import randn_tensor

    check_pipe(pipe, pictures=output_type != "latent")
    _checks.choice("output_type", output_type, OUTPUTS)
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        _checks.refuse("generator", "be a torch.Generator or None", got, TypeError)
    count = 1 if isinstance(prompt, str) or not isinstance(prompt, list) else len(prompt)
    shape = noise_shape(pipe, count, height, width, latents)
    sampler = {} if sampler is None else sampler
    settings = Settings(prompt, negative_prompt, guidance_scale, num_inference_steps, sampler)
    chain = Chain(pipe, settings, count)
    if latents is None:
        latents = randn_tensor(shape, generator, pipe._execution_device, torch.float32)

    def call() -> OptimizeResult:
        return optimize_latents(
            chain.sampler,
            chain.eps,
            partial(_decoded, pipe),
            _users(loss_fn),
            latents,
            saliency_fn=_users(saliency_fn),
            generator=generator,
            **options,
        )

    with in_words(x="latents", sampler="the chain of pipe, num_inference_steps and sampler"):
        result, seconds, peak = measured(call, latents.device)
        pair = result.latents if isinstance(result.latents, tuple) else (result.latents,)
        with torch.no_grad():
            images = _images(pipe, chain.sampler.sample(chain.eps, *pair)[0], output_type)
    return Optimized(images, result, seconds, peak)


def _users(function: Any) -> Any:
    """A user's function, whose refusals are in the words of whom it calls."""

    def called(image: Tensor) -> Tensor:
        with _checks.not_renamed():
            return function(image)

    return called if callable(function) else function


def _encoded(pipe: DiffusionPipeline, pixels: Tensor) -> Tensor:
    """The latents of pixels, without noise."""
    dtype = unwrapped(pipe.vae).dtype
    encoded = pipe.vae.encode(pixels.to(dtype))
    tiny = not hasattr(encoded, "latent_dist")  # AutoencoderTiny, which draws nothing
    x = encoded.latents if tiny else encoded.latent_dist.mode()
    x = x * pipe.vae.config.scaling_factor
    if not x.isfinite().all():
        rule = "have a VAE that makes finite latents of image"
        _checks.refuse("pipe", rule, f"nan or inf in {_checks.name(dtype)}")
    return x


def _decoded(pipe: DiffusionPipeline, x: Tensor) -> Tensor:
    """The images [B, 3, H, W] of latents, in -1..1."""
    x = x.to(unwrapped(pipe.vae).dtype) / pipe.vae.config.scaling_factor
    return pipe.vae.decode(x).sample.float()


def _images(pipe: DiffusionPipeline, x: Tensor, output_type: str) -> Any:
    if output_type == "latent":
        return x
    return pipe.image_processor.postprocess(_decoded(pipe, x), output_type=output_type)


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
