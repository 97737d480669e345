"""Pipelines of other U-Nets and schedules, and how a chain refuses them."""

from __future__ import annotations

import pytest
import torch
from pipelines import diffusers
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import invert, optimize

IMAGE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ALL = {"_use_default_values": []}  # a config's values, also those that are a class's defaults


def other_unet(**config: object) -> diffusers.DiffusionPipeline:
    """The tiny pipeline with a U-Net of another config."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, **ALL, **config}).eval()
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
    return (pipe.vae.encode(2 * IMAGE - 1).latent_dist.mode() * pipe.vae.config.scaling_factor).double()


def refused(pipe: diffusers.DiffusionPipeline, sentence: str, **options: object) -> None:
    """By both ways into a chain, before the text encoder or the VAE is called."""
    calls = []
    for part in (pipe.text_encoder, pipe.vae.encoder):
        part.register_forward_pre_hook(lambda *_: calls.append(1))
    given = {"num_inference_steps": 2} | options
    with pytest.raises(ValueError, match=f"^{sentence}"):
        invert(pipe, IMAGE, "a cat", **given)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        optimize(pipe, "a cat", torch.mean, steps=1, progress=False, **given)
    assert not calls
