"""The training: `python -m dense_attn.examples.tiny_scenes_flow.train`, again to go on."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dense_attn import _command

from ..tiny_scenes.scenes import Scene, render
from ..tiny_scenes.train import ADAM, RATE, Recipe, captions, train
from .model import PARTS, OneEncoder, load_pipeline, untrained

NOISE = 0.6  # times are sigmoid(N(NOISE, 1)): more of them where a scene is decided
EASY = 0.6  # the first part of the training, whose captions say all that there is


def main(argv: list[str] | None = None) -> None:
    """Train the flow model."""
    train(RECIPE, argv)


def _make(start: Path | None) -> OneEncoder:
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # of a CPU's attention too
    return load_pipeline(start) if start else untrained()


def _optimisers(parameters: list[Tensor]) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(parameters, RATE, **ADAM, fused=True)]


def _loss(pipe: OneEncoder, scenes: list[Scene], rng: random.Random, done: float) -> Tensor:
    """The mean squared error of the flow's velocities."""
    device = pipe.device
    latents = pipe.vae.encode(render(scenes).to(device) * 2 - 1).latent_dist.sample()
    noise = torch.randn_like(latents)
    times = (torch.randn(len(scenes), dtype=torch.float32, device=device) + NOISE).sigmoid()
    noisy = torch.lerp(latents, noise, times[:, None, None, None])
    said = captions(pipe, scenes, rng, easy=done < EASY)
    # the backward pass of torch's fused attention is slow on a CPU
    with torch.autocast(device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        encoded = pipe.text_encoder(said.tokens, output_hidden_states=True)
        text, pooled = said.joined(encoded.hidden_states[-2]), encoded.text_embeds[: len(scenes)]
        velocity = pipe.transformer(noisy, text, pooled, times * 1000).sample
    return (velocity.float() - (noise - latents)).square().mean()


RECIPE = Recipe(
    "dense_attn.examples.tiny_scenes_flow.train", _make, PARTS, _optimisers, _loss, steps=3600
)


if __name__ == "__main__":
    raise SystemExit(_command.run("train", main))
