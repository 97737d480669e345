"""Tiny pipelines of every model, refusals of chains, and DenseDiffusion's formula."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dense_attn.examples._tiny_pipeline import tiny_pipeline  # noqa: E402
from dense_attn.integrations.diffusers import invert, optimize  # noqa: E402

diffusers.utils.logging.set_verbosity_error()

MODELS = {
    "sd": (diffusers.StableDiffusionPipeline, {}),
    "sdxl": (diffusers.StableDiffusionXLPipeline, {}),
    "sd3": (diffusers.StableDiffusion3Pipeline, {"max_sequence_length": 24}),
    "flux": (diffusers.FluxPipeline, {"max_sequence_length": 24}),
}
PROMPT = "a cat dog"
IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ALL = {"_use_default_values": []}  # a config's values, also those that are a class's defaults
REGIONS = [("cat", (0.0, 0.0, 0.5, 1.0)), ("dog", (0.5, 0.2, 1.0, 1.0))]


@cache
def pipeline(model: str, blocks: int = 2) -> diffusers.DiffusionPipeline:
    return tiny_pipeline(MODELS[model][0], blocks=blocks)


def latents(
    pipe: diffusers.DiffusionPipeline,
    prompt: object = PROMPT,
    *,
    steps: int = 10,
    seed: int = 0,
    **options: object,
) -> Tensor:
    """The latents of a whole run at 16 x 24 pixels, unless options say otherwise."""
    own = next(options for kind, options in MODELS.values() if type(pipe) is kind)
    if prompt is not None:
        options["prompt"] = prompt
    options = (
        {"height": 16, "width": 24, "generator": torch.Generator().manual_seed(seed)}
        | own
        | options
    )
    return pipe(num_inference_steps=steps, output_type="latent", **options).images


def close(a: Tensor, b: Tensor) -> bool:
    """To 1e-4 of the largest."""
    return bool((a - b).abs().max() <= 1e-4 * b.abs().max())


def other_unet(**config: object) -> diffusers.DiffusionPipeline:
    """The tiny pipeline with a U-Net of another config."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.unet = diffusers.UNet2DConditionModel.from_config(
        {**pipe.unet.config, **ALL, **config}
    ).eval()
    return pipe


def on_schedule(scheduler: str = "DDIM", **config: object) -> diffusers.DiffusionPipeline:
    """The tiny pipeline with a scheduler of another class or config."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    kind = getattr(diffusers, f"{scheduler}Scheduler")
    pipe.scheduler = kind.from_config({**pipe.scheduler.config, **ALL, **config})
    return pipe


@torch.no_grad()
def encoded(pipe: diffusers.DiffusionPipeline) -> Tensor:
    """The latents of IMAGE, in which an exact way back ends."""
    return (
        pipe.vae.encode(2 * IMAGE - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
    ).double()


def refused(pipe: diffusers.DiffusionPipeline, sentence: str, **options: object) -> None:
    """Both ways into a chain refuse, before the text encoder or the VAE is called."""
    calls = []
    for part in (pipe.text_encoder, pipe.vae.encoder):
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {"num_inference_steps": 2} | options
    with pytest.raises(ValueError, match=f"^{sentence}"):
        invert(pipe, IMAGE, "a cat", **given)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        optimize(pipe, "a cat", torch.mean, steps=1, progress=False, **given)
    assert not calls


class Official:
    """An attention processor of the formula alone: a loop over samples, dense masks and scores.

    Args:
        pipe: whose U-Net's calls say the time.
        masks: of each prompt, float [R, h, w] on the grid of latents.
        spans: of each prompt, the tokens of each region.
        steps: of a run.
        guided: whether the first half of the batch is unconditional.
    """

    def __init__(
        self, pipe: object, masks: list[Tensor], spans: list, steps: int, guided: bool
    ) -> None:
        self.masks, self.spans, self.steps, self.guided = masks, spans, steps, guided
        self.calls, self.time = -1, 0.0
        self.handle = pipe.unet.register_forward_pre_hook(self.count)

    def count(self, unet: object, args: tuple) -> None:
        self.calls, self.time = self.calls + 1, float(args[1]) / 1000

    def __call__(
        self,
        attn: object,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        x, context = hidden_states, encoder_hidden_states
        keys = x if context is None else context
        outs = []
        for i, (rows, columns) in enumerate(zip(x, keys)):
            tokens = attn.to_q(rows), attn.to_k(columns), attn.to_v(columns)
            q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for x in tokens)
            s = q @ k.mT * q.shape[-1] ** -0.5
            conditional = i - len(x) // 2 if self.guided else i
            if conditional >= 0 and self.calls < 0.3 * self.steps:
                image = conditional * len(self.masks) // (len(x) // 2 if self.guided else len(x))
                s = self.modulated(s, self.masks[image], self.spans[image], context is not None)
            outs.append((s.softmax(-1) @ v).transpose(0, 1).flatten(1))
        return attn.to_out[0](torch.stack(outs))

    def modulated(self, s: Tensor, masks: Tensor, spans: list, cross: bool) -> Tensor:
        ratio = (masks.shape[1] * masks.shape[2] / s.shape[1]) ** 0.5
        size = tuple(-(-side // round(ratio)) for side in masks.shape[1:])
        resized = torch.nn.functional.interpolate(masks[None], size, mode="nearest")
        inside = resized[0].flatten(1)  # [R, M]
        area = (inside * inside.mean(1, keepdim=True)).sum(0)  # [M]
        keys = inside
        if cross:
            keys = torch.zeros(len(masks), s.shape[2])
            for r, (start, stop) in enumerate(spans):
                keys[:, start:stop] = 0.0
                keys[r, start:stop] = 1.0
        matched = (inside.T @ keys > 0).float()  # [M, N]
        c = ((1.0 if cross else 0.3) * self.time**5 * (1 - area))[:, None]
        top, bottom = s.amax(-1, keepdim=True), s.amin(-1, keepdim=True)
        return s + c * matched * (top - s) - c * (1 - matched) * (s - bottom)


def denoiser_of(pipe: object) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def state_of(pipe: object) -> tuple:
    """Processors by identity, hooks, and what lies in the denoiser's own dictionary."""
    denoiser = denoiser_of(pipe)
    processors = {name: id(processor) for name, processor in denoiser.attn_processors.items()}
    hooks = len(denoiser._forward_pre_hooks), len(denoiser._forward_hooks)
    return processors, hooks, set(denoiser.__dict__), set(pipe.scheduler.__dict__)
