"""A pipeline's schedule and U-Net as a reversible chain, and what it can be asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import ReversibleSampler, _checks

from ._hooks import unwrapped, watchers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAMPLER = ("method", "mix", "gamma", "alternate", "exact", "backend")


@dataclass(frozen=True)
class Settings:
    """How images are sampled; the way back takes the same."""

    prompt: str | list[str]
    negative_prompt: str | list[str]
    guidance_scale: float
    num_inference_steps: int
    sampler: dict[str, Any] = field(default_factory=dict)


class Chain:
    """A reversible sampler on a pipeline's schedule, and its U-Net as the function of latents that it takes."""

    def __init__(self, pipe: DiffusionPipeline, settings: Settings, count: int) -> None:
        from diffusers import DDIMScheduler

        scale = _checks.number("guidance_scale", settings.guidance_scale)
        steps = settings.num_inference_steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            _checks.refuse("num_inference_steps", "be a whole number of at least 1", repr(steps))
        for name in settings.sampler:
            _checks.choice("sampler", name, SAMPLER)
        self.pipe, self.scale = pipe, scale
        self.text = self._encoded(settings, count, scale != 1)
        if "beta_start" not in pipe.scheduler.config:
            rule = "have a scheduler of Stable Diffusion's noise schedule (betas)"
            _checks.refuse("pipe", rule, type(pipe.scheduler).__name__)
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            _checks.refuse("pipe", "predict epsilon or v", scheduler.config.prediction_type)
        scheduler.set_timesteps(settings.num_inference_steps)
        self.alphas = scheduler.alphas_cumprod if scheduler.config.prediction_type == "v_prediction" else None
        self.sampler = ReversibleSampler(
            scheduler.alphas_cumprod, scheduler.timesteps, final_alpha_cumprod=scheduler.final_alpha_cumprod,
            dtype=unwrapped(pipe.unet).dtype, **settings.sampler,
        )  # fmt: skip

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided estimate of the noise in x."""
        batch = x if self.scale == 1 else torch.cat([x, x])
        out = self.pipe.unet(batch, t, encoder_hidden_states=self.text, return_dict=False)[0]
        if self.alphas is not None:
            alpha = self.alphas[int(t)].to(out)
            out = alpha.sqrt() * out + (1 - alpha).sqrt() * batch
        if self.scale == 1:
            return out
        uncond, text = out.chunk(2)
        return uncond + self.scale * (text - uncond)

    @torch.no_grad()
    def _encoded(self, settings: Settings, count: int, guided: bool) -> Tensor:
        """Text tokens of the batch, those of the negative prompt first."""
        if not count:
            _checks.refuse("prompt", "hold at least one", "none")
        texts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
        for argument, text in texts.items():
            texts[argument] = [text] * count if isinstance(text, str) else text
            if not isinstance(texts[argument], list) or not all(isinstance(one, str) for one in texts[argument]):
                _checks.refuse(argument, "be a string or a list of strings", repr(text), TypeError)
            if len(texts[argument]) != count:
                _checks.refuse(argument, f"hold one entry for each of the {count} images", len(text))
        options = {"device": self.pipe._execution_device, "num_images_per_prompt": 1}
        text, negative = self.pipe.encode_prompt(**texts, do_classifier_free_guidance=guided, **options)
        return torch.cat([negative, text]) if guided else text


def check_pipe(pipe: DiffusionPipeline) -> None:
    """Refuse what is no plain Stable Diffusion 1 or 2."""
    unet = unwrapped(getattr(pipe, "unet", None))
    parts = [name for name in ("vae", "tokenizer", "text_encoder") if getattr(pipe, name, None) is None]
    if type(unet).__name__ != "UNet2DConditionModel" or unet.config.addition_embed_type or parts:
        _checks.refuse("pipe", "be of Stable Diffusion 1 or 2", type(pipe).__name__)
    if watchers(unet):
        _checks.refuse("pipe", "be outside of apply_layout and semantic_guidance", "a pipeline inside of such a block")


def check_images(images: Any) -> Any:
    """PIL images in colour, or a tensor [B, 3, H, W] in 0..1."""
    if isinstance(images, Tensor):
        if images.dim() != 4 or images.shape[1] != 3 or not len(images):
            _checks.refuse("image", "have shape (B, 3, H, W)", tuple(images.shape))
        if not images.is_floating_point():
            _checks.refuse("image", "be a tensor of floats in 0..1", _checks.name(images.dtype), TypeError)
        if not bool(((images >= 0) & (images <= 1)).all()):
            low, high = (bound.item() for bound in images.aminmax())
            _checks.refuse("image", "be a tensor of floats in 0..1", f"values from {low:g} to {high:g}")
        return images
    listed = images if isinstance(images, (list, tuple)) else [images]
    if not listed or not all(hasattr(image, "convert") for image in listed):
        _checks.refuse("image", "be a PIL image, a list of them or a tensor", repr(images)[:80], TypeError)
    return [image.convert("RGB") for image in listed]


def check_size(pipe: DiffusionPipeline, height: int | None, width: int | None) -> tuple[int, int, int]:
    """The channels, rows and columns of latents of images of a size, by default the U-Net's own."""
    unit = pipe.vae_scale_factor
    own = unwrapped(pipe.unet).config.sample_size * unit
    for name, side in (("height", height), ("width", width)):
        if side is not None and (not isinstance(side, int) or side <= 0 or side % unit):
            _checks.refuse(name, f"be a positive multiple of {unit}", repr(side))
    return unwrapped(pipe.unet).config.in_channels, (height or own) // unit, (width or own) // unit
