"""A pipeline's schedule and U-Net as a reversible chain, and what it can be asked for."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import ReversibleSampler, _checks

from .hooks import unwrapped

if TYPE_CHECKING:
    from diffusers import DDIMScheduler, DiffusionPipeline

SAMPLER = ("method", "mix", "gamma", "alternate", "exact", "backend")
# taken from a config also where they are its defaults
NOISE = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
WORDS = {  # what the sampler is given here, as a caller knows it
    "timesteps": "num_inference_steps",
    "alphas_cumprod": "the noise schedule of pipe",
    "dtype": "pipe.unet's dtype",
    "eps_fn": "pipe.unet",
    "eps_fn's result": "pipe.unet's result",
    "decode_fn": "pipe.vae",
}


@dataclass(frozen=True)
class Settings:
    """How images are sampled; the way back takes the same."""

    prompt: str | list[str]
    negative_prompt: str | list[str]
    guidance_scale: float
    num_inference_steps: int
    sampler: dict[str, Any] = field(default_factory=dict)


class Chain:
    """A reversible sampler on a pipeline's schedule, with its U-Net as the network."""

    def __init__(self, pipe: DiffusionPipeline, settings: Settings, count: int) -> None:
        self.pipe, self.settings = pipe, settings
        self.scale = _checks.number("guidance_scale", settings.guidance_scale)
        texts = _texts(settings, count)
        if not isinstance(settings.sampler, dict):
            _checks.refuse("sampler", "be a dict", type(settings.sampler).__name__, TypeError)
        for name in settings.sampler:
            _checks.choice("sampler", name, SAMPLER)
        scheduler = _schedule(pipe, settings.num_inference_steps)
        velocity = scheduler.config.prediction_type == "v_prediction"
        self.alphas = scheduler.alphas_cumprod if velocity else None
        final = 1.0 if scheduler.config.set_alpha_to_one else None
        with in_words():
            self.sampler = ReversibleSampler(
                scheduler.alphas_cumprod,
                scheduler.timesteps,
                final_alpha_cumprod=final,
                dtype=unwrapped(pipe.unet).dtype,
                **settings.sampler,
            )
        self.text = self._encoded(texts)

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


def in_words(**more: str) -> AbstractContextManager[None]:
    """A sampler's refusals in the words of who called invert, reconstruct or optimize."""
    return _checks.renamed(WORDS | more)


def _texts(settings: Settings, count: int) -> dict[str, list[str]]:
    """A prompt and a negative prompt for each image."""
    if not count:
        _checks.refuse("prompt", "hold at least one", "none")
    texts = {"prompt": settings.prompt, "negative_prompt": settings.negative_prompt}
    for argument, text in texts.items():
        texts[argument] = [text] * count if isinstance(text, str) else text
        if not isinstance(texts[argument], list) or not all(
            isinstance(one, str) for one in texts[argument]
        ):
            _checks.refuse(argument, "be a string or a list of strings", repr(text), TypeError)
        if len(texts[argument]) != count:
            _checks.refuse(argument, f"hold one entry for each of the {count} images", len(text))
    return texts


def _schedule(pipe: DiffusionPipeline, steps: int) -> DDIMScheduler:
    """The pipeline's noise schedule, with the timesteps of a chain."""
    from diffusers import DDIMScheduler

    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        _checks.refuse("num_inference_steps", "be a whole number of at least 1", repr(steps))
    config = pipe.scheduler.config
    if "beta_start" not in config:
        rule = "have a scheduler of Stable Diffusion's noise schedule (betas)"
        _checks.refuse("pipe", rule, type(pipe.scheduler).__name__)
    try:
        scheduler = DDIMScheduler.from_config(
            config, **{name: config[name] for name in NOISE if name in config}
        )
    except NotImplementedError:
        _checks.refuse(
            "pipe",
            "have a scheduler of a beta_schedule that DDIM knows",
            repr(config["beta_schedule"]),
        )
    if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
        _checks.refuse("pipe", "predict epsilon or v", scheduler.config.prediction_type)
    alphas, most = scheduler.alphas_cumprod, scheduler.config.num_train_timesteps
    if steps > most:
        _checks.refuse(
            "num_inference_steps", f"be at most {most}, the timesteps of pipe's schedule", steps
        )
    scheduler.set_timesteps(steps)
    scheduler.timesteps = scheduler.timesteps[:steps]  # "trailing" may round to one more, -1
    first = int(scheduler.timesteps[0])
    if first >= len(alphas):
        rule = f"keep the timesteps of pipe's schedule below {len(alphas)}"
        _checks.refuse("num_inference_steps", rule, f"{steps}, which begin at {first}")
    if alphas[first] == 0:
        rule = "have a scheduler that leaves signal at the first timestep"
        rule += ", as timestep_spacing='leading' does"
        _checks.refuse("pipe", rule, f"alpha_bar 0 at timestep {first}")
    return scheduler
