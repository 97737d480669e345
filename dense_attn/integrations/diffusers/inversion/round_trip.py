"""invert and reconstruct: a pipeline's image to its noise and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

from ..models import model_of
from . import videos
from .autoencoder import encoded
from .chain import Chain
from .images import check_images, pixels_of
from .rehearsed import Rehearsed
from .settings import Settings, in_words
from .shared import OUTPUTS, check_pipe, denoiser_of, images_of, measured
from .stable_diffusion import check_noise

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Inversion:
    """The noise of an image, and what it took to find it.

    Attributes:
        latents: the pair of latents at the noise end, as the pipeline's loop has them (packed, of
            FLUX and Qwen-Image), in float64 where the chain is exact.
        settings: those of the way back.
        seconds: wall time.
        peak_bytes: what was added to the memory in use at the peak; None where the system does not
            tell.
        denoiser: the kind of the pipeline's denoiser; None in inversions that were saved without.
    """

    latents: tuple[Tensor, Tensor]
    settings: Settings
    seconds: float
    peak_bytes: int | None
    denoiser: str | None = None


def invert(
    pipe: DiffusionPipeline,
    image: Any,
    prompt: str | list[str],
    *,
    negative_prompt: str | list[str] = "",
    num_inference_steps: int = 50,
    guidance_scale: float | None = None,
    call: dict[str, Any] | None = None,
    progress: bool = False,
    **sampler: Any,
) -> Inversion:
    """The noise of an image, from which `reconstruct` makes the image again, or an edit of it.

    The image is encoded, `z = (vae(image) - shift) * scale` as its pipelines have it, and
    `ReversibleSampler.invert` takes z to the noise; with exact chains, the default, the way back
    ends in the very bits of z. The network is the pipeline's own: a copy of the pipeline is called
    with a stand-in for its denoiser, and what that is asked in each step (packed latents, texts,
    masks, shifted sigmas, both branches) is asked again of the denoiser.

    Args:
        pipe: one of a family that has a record (the table in docs/diffusers.md): a pipeline that
            makes images or videos of a prompt alone, without a cache or an IP-Adapter, whose
            scheduler is a flow's (the chain is then the flow's, its schedule as the pipeline sets
            it) or has Stable Diffusion's noise schedule (the chain is then DDIM's). Of Stable
            Diffusion 1 and 2 any with a schedule that leaves signal at the first timestep and a
            U-Net of latents, timestep and text alone; a ControlNet or adapter beside it is not
            called.
        image: a PIL image, a list of them of one size, or a tensor [B, 3, H, W] in 0..1. A warning
            says where it is resized, to multiples of the pipeline's tokens, and where transparent
            pixels are taken as opaque. For pipelines of videos a video: a list of PIL images, a
            tensor [F, 3, H, W] in 0..1, or an array [F, H, W, 3] of these or of bytes; or several,
            as pipelines return them. It is not resized.
        prompt, negative_prompt: what the image shows, and what it does not; one for all images or
            one for each. A negative prompt without guidance is refused.
        num_inference_steps: of the chain.
        guidance_scale: classifier-free guidance in the pipeline's own numbers (its true_cfg_scale,
            where it has one, or its guider's); 1 for none, on Z-Image 0, and less on Stable
            Diffusion 1 and 2 alone. None: 3, or the pipeline's own default where that is less.
            Large ones drive EDICT's pair apart.
        call: further arguments of the pipeline's call: `{"guidance_scale": 3.5}` for the number
            that FLUX's network is told, max_sequence_length, sigmas (of flows, one a step), texts
            of other encoders.
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
    unit = check_pipe(pipe)
    many = unit is not None and videos.makes_videos(pipe)
    if not many:
        image = check_images(pipe, image, unit)
    settings = Settings(
        prompt, negative_prompt, guidance_scale, num_inference_steps, sampler, call or {}
    )
    with in_words(pipe, sampler="a further argument"):
        if many:
            pixels = videos.pixels_of(pipe, model_of(pipe), image, unit)
            settings = replace(settings, frames=pixels.shape[2])
        else:
            pixels = pixels_of(pipe, image, unit)
        if unit is None:
            chain = Chain(pipe, settings, len(pixels))
        else:
            settings = replace(settings, size=tuple(pixels.shape[-2:]))
            generator = torch.Generator()  # of noise that nothing is done with
            chain = Rehearsed(pipe, settings, len(pixels), generator)
    with torch.no_grad(), in_words(pipe, x=f"the latents of {'video' if many else 'image'}"):
        x = encoded(pipe, chain.model, pixels)
        invert_it = partial(chain.sampler.invert, chain.eps, x, progress=progress)
        latents, seconds, peak = measured(invert_it, x.device)
    return Inversion(latents, chain.settings, seconds, peak, denoiser_of(pipe))


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
        pipe: the pipeline of the inversion, or another of its kind of denoiser.
        inversion: what `invert` returned.
        prompt: None for that of the inversion.
        output_type: "pil", "pt", "np" or "latent", as pipelines have it; latents as in their loop.
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
    unit = check_pipe(pipe, pictures=output_type != "latent")
    if not isinstance(inversion, Inversion):
        _checks.refuse("inversion", "be what invert returns", type(inversion).__name__, TypeError)
    _check_made(pipe, inversion, unit)
    _checks.choice("output_type", output_type, OUTPUTS)
    name, pair = "the latents of inversion", inversion.latents
    settings = inversion.settings if prompt is None else replace(inversion.settings, prompt=prompt)
    if unit is None:
        for latents in pair:
            check_noise(pipe, name, latents)
        chain = Chain(pipe, settings, len(pair[0]))
    else:
        with in_words(pipe):
            chain = Rehearsed(pipe, settings, len(pair[0]), torch.Generator())
        for latents in pair:
            chain.check(name, latents)
    with in_words(pipe, x=name, y=name):
        x, _ = chain.sampler.sample(chain.eps, *pair, progress=progress)
    return images_of(pipe, chain, x, output_type)


def _check_made(pipe: DiffusionPipeline, inversion: Inversion, unit: int | None) -> None:
    """Refuse an inversion of another kind of denoiser, or of what the pipeline does not make."""
    settings, kind = inversion.settings, denoiser_of(pipe)
    if inversion.denoiser not in (None, kind):
        got = f"one of {inversion.denoiser}"
        _checks.refuse("inversion", f"be of a pipeline of {kind}", got)
    many = unit is not None and videos.makes_videos(pipe)
    if settings.made != (made := "videos" if many else "images"):
        _checks.refuse("inversion", f"be of {made}, which pipe makes", f"one of {settings.made}")
    if many:
        argument = "the number of frames of inversion"
        videos.whole_frames(pipe, model_of(pipe), settings.frames, argument)
    if any(side is not None and side % (unit or 1) for side in settings.size):
        height, width = settings.size
        rule = f"be of sides of multiples of {unit}"
        _checks.refuse("inversion", rule, f"{width} x {height}")
