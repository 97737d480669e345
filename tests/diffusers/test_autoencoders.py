"""The VAEs of pipelines that invert and optimize take."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipelines import ALL, IMAGE, diffusers

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_vae_of_images_with_depth_is_refused() -> None:
    parts = tiny_pipeline(diffusers.StableDiffusionPipeline).components
    pipe = diffusers.StableDiffusionLDM3DPipeline(**parts, requires_safety_checker=False)
    pipe.vae = diffusers.AutoencoderKL.from_config(
        {**pipe.vae.config, **ALL, "in_channels": 6, "out_channels": 6}
    )
    with pytest.raises(
        ValueError, match=r"pipe must have a VAE of images of 3 channels, got .*3DPipeline with 6"
    ):
        invert(pipe, IMAGE, "a cat", num_inference_steps=2)


def test_a_vae_that_overflows_is_refused() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.vae.encoder.conv_out.weight.data.fill_(np.inf)
    for exact in (True, False):
        with pytest.raises(
            ValueError, match="pipe must have a VAE that makes finite latents of image, got nan"
        ):
            invert(pipe, IMAGE, "a cat", num_inference_steps=2, exact=exact)


def tiny_vae(kind: str) -> torch.nn.Module:
    """An autoencoder of another class, whose results and config have other names."""
    if kind == "AutoencoderTiny":
        sizes = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
        sizes |= {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    else:
        encoder = {
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "down_block_types": ["DownEncoderBlock2D"] * 2,
        }
        decoder = {
            "block_out_channels": (8, 8),
            "norm_num_groups": 4,
            "up_block_types": ["ResnetUpsampleBlock2D"] * 2,
        }
        decoder["down_block_types"] = ["ResnetDownsampleBlock2D"] * 2
        sizes = {f"encoder_{name}": value for name, value in encoder.items()}
        sizes |= {f"decoder_{name}": value for name, value in decoder.items()}
    return getattr(diffusers, kind)(**sizes).eval()


@pytest.mark.parametrize("kind", ["AutoencoderTiny", "ConsistencyDecoderVAE"])
def test_other_autoencoders(kind: str) -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.vae = tiny_vae(kind)
    found = invert(pipe, IMAGE, "a cat", num_inference_steps=2)
    with torch.no_grad():
        coded = pipe.vae.encode(2 * IMAGE - 1)
        x = coded.latents if kind == "AutoencoderTiny" else coded.latent_dist.mode()
    expected = (x * pipe.vae.config.scaling_factor).double()
    torch.testing.assert_close(
        reconstruct(pipe, found, output_type="latent"), expected, rtol=0, atol=1e-6
    )


def test_latents_need_no_image_processor() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    found = invert(pipe, IMAGE, "a cat", num_inference_steps=2)
    del pipe.image_processor
    assert reconstruct(pipe, found, output_type="latent").shape == (1, 4, 8, 8)
    given = {"num_inference_steps": 2, "steps": 0, "progress": False, "output_type": "latent"}
    assert optimize(pipe, "a cat", torch.mean, **given).images.shape == (1, 4, 8, 8)
    with pytest.raises(
        ValueError, match=r"of Stable Diffusion 1 or 2, got .*Pipeline without image_processor"
    ):
        reconstruct(pipe, found)
