"""Chains of every family: the networks are the pipelines' own, and bits return."""

from __future__ import annotations

import pytest
import torch
from families.chained import (
    FLOWS,
    NAMES,
    NEGATIVE,
    PROMPT,
    SCALE,
    call_of,
    chain_of,
    frames_of,
    image_of,
    pipe_of,
    plain_run,
    size_of,
    takes,
)
from pipelines import close
from torch import Tensor

from dense_attn.integrations.diffusers import invert, reconstruct
from dense_attn.integrations.diffusers.inversion.autoencoder import decoded, encoded
from dense_attn.integrations.diffusers.inversion.rehearsed import Rehearsed
from dense_attn.integrations.diffusers.inversion.shared import images_of

pytestmark = pytest.mark.usefixtures("one_thread")


def each(*quick: str) -> pytest.MarkDecorator:
    """A test of every family, of which few are quick."""
    marked = [
        name if name in quick else pytest.param(name, marks=pytest.mark.full) for name in NAMES
    ]
    return pytest.mark.parametrize("name", marked)


@each("sd3", "flux", "qwen", "z_image", "sdxl", "wan", "cogvideox")
def test_a_chain_of_plain_steps_is_the_pipeline(name: str) -> None:
    """One step and four, with a negative prompt and without; a flow's have the same bits."""
    for guided, steps in ((True, 1), (True, 4), (False, 4)):
        method = "euler" if name in FLOWS else "ddim"
        chain = chain_of(name, steps, guided=guided, method=method)
        with torch.no_grad():
            found = chain.sampler.sample(chain.eps, chain.latents)[0]
        expected, _ = plain_run(name, chain, output_type="latent")
        if name in FLOWS:
            assert torch.equal(found, expected)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def latents_of(name: str, chain: Rehearsed) -> Tensor:
    """The latents of its image, or video."""
    pipe = pipe_of(name)
    pixels = 2 * image_of(name) - 1
    if frames_of(name):
        pixels = pixels.transpose(1, 2)
    with torch.no_grad():
        return encoded(pipe, chain.model, pixels)


@each("flux2", "qwen", "wan", "ltx")
def test_images_of_latents_are_the_pipelines(name: str) -> None:
    """And those of the encoder are what the decoder's normalisation undoes."""
    chain, pipe = chain_of(name, 1), pipe_of(name)
    latents, images = plain_run(name, chain, output_type="pt")
    with torch.no_grad():
        found = images_of(pipe, chain, latents, "pt")
    assert close(found, images)
    x = latents_of(name, chain)
    assert x.shape == latents.shape
    seen, own = [], pipe.vae.decode
    try:
        pipe.vae.decode = lambda z, **_: seen.append(z) or own(z)
        with torch.no_grad():
            decoded(pipe, chain.model, x, chain.grid)
            pixels = 2 * image_of(name) - 1
            if seen[0].dim() == 5:
                pixels = pixels.transpose(1, 2) if frames_of(name) else pixels.unsqueeze(2)
            made = pipe.vae.encode(pixels)
    finally:
        del pipe.vae.decode
    z = made.latent_dist.mode() if hasattr(made, "latent_dist") else made.latent
    assert close(seen[0], z)


@each("sd3", "qwen", "wan")
def test_an_image_comes_back_from_its_noise(name: str) -> None:
    """From the latents to the noise and back, and from the noise again: 0 differing bits."""
    pipe = pipe_of(name)
    options = {"num_inference_steps": 3, "call": call_of(name), "guidance_scale": SCALE}
    if "negative_prompt" in takes(name):
        options["negative_prompt"] = NEGATIVE
    found = invert(pipe, image_of(name), PROMPT, **options)
    assert found.settings.size == size_of(name)
    chain = chain_of(name, 3)
    pair = chain.sampler.sample(chain.eps, *found.latents)
    assert all(map(torch.equal, chain.sampler.invert(chain.eps, *pair), found.latents))
    back = reconstruct(pipe, found, output_type="latent")
    assert torch.equal(back, pair[0])
    x = latents_of(name, chain)
    assert (back - x).abs().max() <= 2.0**-20
    edited = reconstruct(pipe, found, "dog", output_type="latent")
    assert not close(edited, back)
    assert reconstruct(pipe, found, output_type="pt").shape == image_of(name).shape
