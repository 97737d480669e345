"""Stable Diffusion 1 and 2 as a reversible chain: their noise schedule, U-Net and text encoder."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dense_attn import ReversibleSampler, _checks

from ..hooks import unwrapped
from ..models.unet import UNet
from .schedules import noise_of, of_noise, velocities
from .settings import Settings, check_unguided, in_words

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline

GUIDANCE = 3.0  # where nothing is said


class Chain:
    """A reversible sampler on a pipeline's schedule, with its U-Net as the network."""

    model, grid = UNet(), (0, 0)  # latents are as the VAE has them, but for its scaling

    def __init__(self, pipe: DiffusionPipeline, settings: Settings, count: int) -> None:
        settings = settings.checked()
        if settings.guidance_scale is None:
            settings = replace(settings, guidance_scale=GUIDANCE)
        self.pipe, self.settings, self.scale = pipe, settings, float(settings.guidance_scale)
        texts = settings.texts(count)
        if self.scale == 1:
            check_unguided("negative_prompt", texts["negative_prompt"], 1)
        if settings.call:
            _checks.refuse("call", "be empty on Stable Diffusion 1 and 2", list(settings.call))
        scheduler = of_noise(pipe, settings.num_inference_steps)
        self.alphas = velocities(scheduler)
        self.sampler = on_noise(pipe, scheduler, settings, unwrapped(pipe.unet).dtype)
        self.text = self._encoded(texts)

    def eps(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided estimate of the noise in x."""
        batch = x if self.scale == 1 else torch.cat([x, x])
        out = self.pipe.unet(batch, t, encoder_hidden_states=self.text, return_dict=False)[0]
        out = noise_of(self.alphas, t, batch, out)
        if self.scale == 1:
            return out
        uncond, text = out.chunk(2)
        return uncond + self.scale * (text - uncond)

    @torch.no_grad()
    def _encoded(self, texts: dict[str, list[str]]) -> Tensor:
        """Text tokens of the batch, those of the negative prompt first."""
        guided = self.scale != 1
        options = {"device": self.pipe._execution_device, "num_images_per_prompt": 1}
        text, negative = self.pipe.encode_prompt(
            **texts, do_classifier_free_guidance=guided, **options
        )[:2]
        config = unwrapped(self.pipe.unet).config
        wanted = config.encoder_hid_dim or config.cross_attention_dim
        widths = {wanted} if isinstance(wanted, int) else set(wanted)
        if widths != {text.shape[-1]}:
            listed = ", ".join(map(str, sorted(widths)))
            rule = f"have a text encoder of the width that its U-Net takes, {listed}"
            _checks.refuse("pipe", rule, text.shape[-1])
        return torch.cat([negative, text]) if guided else text


def on_noise(
    pipe: DiffusionPipeline, scheduler: DDIMScheduler, settings: Settings, dtype: torch.dtype
) -> ReversibleSampler:
    """The sampler of a noise schedule."""
    final = 1.0 if scheduler.config.set_alpha_to_one else None
    with in_words(pipe):
        return ReversibleSampler(
            scheduler.alphas_cumprod,
            scheduler.timesteps,
            final_alpha_cumprod=final,
            dtype=dtype,
            **settings.sampler,
        )
