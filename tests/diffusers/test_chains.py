"""Which pipelines invert and optimize take, the noise that they draw, and what they refuse."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
from pipelines import ALL, IMAGE, diffusers, other_unet, pipeline, refused
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import invert, optimize, reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")
NEEDED = {"vae", "text_encoder", "tokenizer", "unet", "scheduler"}
OTHERS = ("UNet3D", "UNetMotion", "I2VGenXL", "DreamLite", "ControlNetXS")  # U-Nets
REFUSED = {  # of the classes below, by what they lack
    # made without one here, and with another encode_prompt
    "BlipDiffusionControlNetPipeline": "image_processor",
    "BlipDiffusionPipeline": "image_processor",
    "MarigoldDepthPipeline": "encode_prompt",
    "MarigoldIntrinsicsPipeline": "encode_prompt",
    "MarigoldNormalsPipeline": "encode_prompt",
    "SemanticStableDiffusionPipeline": "encode_prompt",
    "StableDiffusionInstructPix2PixPipeline": "encode_prompt",
    "StableDiffusionLatentUpscalePipeline": "encode_prompt",
    "AudioLDMPipeline": "image_processor",
    "MusicLDMPipeline": "image_processor",
}


def parameters(name: str) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(getattr(diffusers, name).__init__).parameters)


def made_alike() -> list[str]:
    """The classes of diffusers that are made of Stable Diffusion's parts."""
    found = []
    for name in (name for name in dir(diffusers) if name.endswith("Pipeline")):
        parts = parameters(name)
        if parts.keys() >= NEEDED and "tokenizer_2" not in parts:
            found += [name] * (not any(word in str(parts["unet"].annotation) for word in OTHERS))
    return found


def made(name: str) -> object:
    """A pipeline of Stable Diffusion's parts, without those that a chain has no use for."""
    parts = tiny_pipeline(diffusers.StableDiffusionPipeline).components
    needed = (
        key for key, one in parameters(name).items() if key in parts or one.default is one.empty
    )
    return getattr(diffusers, name)(
        **{key: parts.get(key) for key in needed if key not in ("self", "args", "kwargs")}
    )


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"in_channels": 9},
            "pipe must have a U-Net of 4 channels in and out, .*, got .* with 9 in and 4 out",
        ),
        (
            {"in_channels": 5},
            "pipe must have a U-Net of 4 channels in and out, .*, got .* with 5 in and 4 out",
        ),
        (
            {"out_channels": 8},
            "pipe must have a U-Net of 4 channels in and out, .*, got .* with 4 in and 8 out",
        ),
        (
            {"num_class_embeds": 3},
            "pipe must have a U-Net of latents, .* num_class_embeds=3, which wants class",
        ),
        (
            {"class_embed_type": "timestep"},
            "pipe must have a U-Net of latents, .*'timestep', which wants class labels",
        ),
        (
            {"class_embed_type": "identity"},
            "pipe must have a U-Net of latents, .*'identity', which wants class labels",
        ),
        (
            {"time_cond_proj_dim": 16},
            "pipe must have a U-Net of latents, .* time_cond_proj_dim=16, which wants the",
        ),
        (
            {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16},
            (
                "pipe must have a U-Net of latents, .*, got .* "
                "encoder_hid_dim_type='image_proj', which wants an image"
            ),
        ),
        (
            {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
            "pipe must be of Stable Diff",
        ),
    ],
    ids=lambda value: str(value)[:40],
)
def test_unets_that_want_more_are_refused(config: dict, sentence: str) -> None:
    refused(other_unet(**config), sentence)


def test_a_text_encoder_of_another_width_is_refused() -> None:
    for config, width in (({"cross_attention_dim": 24}, 24), ({"encoder_hid_dim": 20}, 20)):
        pipe, called = other_unet(**config), []
        pipe.unet.register_forward_pre_hook(lambda *_, called=called: called.append(1))
        sentence = (
            f"pipe must have a text encoder of the width that its U-Net takes, {width}, got 16"
        )
        with pytest.raises(ValueError, match=sentence):
            invert(pipe, IMAGE, "a cat", num_inference_steps=2)
        assert not called


def test_a_unet_that_projects_its_text_is_taken() -> None:
    pipe = other_unet(cross_attention_dim=24, encoder_hid_dim=16)
    again = reconstruct(pipe, invert(pipe, IMAGE, "a cat", num_inference_steps=2), output_type="pt")
    assert again.shape == IMAGE.shape


def test_pipelines_without_a_part_are_refused() -> None:
    for part in ("tokenizer", "text_encoder", "vae", "scheduler"):
        pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
        setattr(pipe, part, None)
        with pytest.raises(
            ValueError,
            match=f"of Stable Diffusion 1 or 2, got StableDiffusionPipeline without {part}",
        ):
            invert(pipe, IMAGE, "a cat", num_inference_steps=2)


@pytest.mark.parametrize("name", made_alike())
def test_every_class_of_its_parts_runs_or_says_why_not(name: str) -> None:
    """The latents are the plain pipeline's: a chain calls U-Net, VAE and text encoder alone."""
    pipe = made(name)
    if name in REFUSED:
        refused(pipe, f"pipe must .*{REFUSED[name]}")
        return
    drawn, found = of_the_plain(pipe.vae.config.scaling_factor)
    assert torch.equal(drawn_by(pipe), drawn)
    if name == "StableDiffusionLDM3DPipeline":  # inverts no image without its depth
        return
    assert all(map(torch.equal, found_by(pipe), found))


@cache
def of_the_plain(scaling_factor: float) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The plain pipeline's latents, of a VAE that a constructor may have changed."""
    pipe = made("StableDiffusionPipeline")
    pipe.vae.register_to_config(scaling_factor=scaling_factor)
    return drawn_by(pipe), found_by(pipe)


def drawn_by(pipe: object) -> Tensor:
    """What optimize makes of one step and noise."""
    options = {"num_inference_steps": 2, "steps": 1, "progress": False, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    return optimize(pipe, "a cat", torch.mean, **options, generator=generator).images


def found_by(pipe: object) -> tuple[Tensor, ...]:
    """The noise of an image."""
    return tuple(invert(pipe, IMAGE, "a cat", num_inference_steps=2).latents)


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "EulerAncestralDiscrete", "PNDM"])
def test_noise_is_what_the_pipeline_itself_draws(scheduler: str) -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 2, "steps": 0, "progress": False, "height": 16, "width": 24}
    drawn = optimize(
        pipe, ["a", "b"], torch.mean, **options, generator=torch.Generator().manual_seed(5)
    ).result.latents
    shape = (2, 4, 16, 24, torch.float32, "cpu")
    scaled = pipe.prepare_latents(*shape, torch.Generator().manual_seed(5))
    expected = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(5))
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(drawn, scaled / pipe.scheduler.init_noise_sigma, rtol=1e-6, atol=0)
    if scheduler in ("DDIM", "PNDM"):
        assert torch.equal(drawn, scaled)
    torch.manual_seed(7)
    drawn = optimize(pipe, ["a", "b"], torch.mean, **options).result.latents
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.randn(2, 4, 8, 12))


def test_the_size_of_the_unet_is_of_two_sides() -> None:
    shapes = {}
    for sample_size in ((6, 10), [6, 10], 8):
        pipe = other_unet(sample_size=sample_size)
        found = optimize(pipe, "a", torch.mean, num_inference_steps=1, steps=0, progress=False)
        shapes[str(sample_size)] = tuple(found.result.latents.shape[2:])
    assert shapes == {"(6, 10)": (6, 10), "[6, 10]": (6, 10), "8": (8, 8)}
    pipe = other_unet(sample_size=None)
    with pytest.raises(
        ValueError, match="height must be given for a U-Net without a sample_size, got None"
    ):
        optimize(pipe, "a", torch.mean, num_inference_steps=1, width=16)
    given = {"num_inference_steps": 1, "steps": 0, "progress": False}
    assert optimize(pipe, "a", torch.mean, height=16, width=20, **given).result.latents.shape == (
        1,
        4,
        8,
        10,
    )
    assert (
        optimize(
            pipe, "a", torch.mean, latents=torch.randn(1, 4, 8, 6), **given
        ).result.latents.shape[3]
        == 6
    )


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        (
            {"latents": torch.randn(1, 9, 8, 8)},
            ValueError,
            r"latents must be a tensor of shape \(1, 4, height",
        ),
        (
            {"latents": torch.randn(1, 4, 8, 0)},
            ValueError,
            r"latents must be a tensor of shape \(1, 4, height",
        ),
        (
            {"latents": torch.randn(1, 4, 8, 8).long()},
            TypeError,
            "latents must be one of float32, .*, got int64",
        ),
        (
            {"latents": torch.full((1, 4, 8, 8), torch.nan)},
            ValueError,
            "latents must be finite, got nan",
        ),
        (
            {"latents": torch.randn(1, 4, 8, 8).to("meta")},
            ValueError,
            "latents must be on pipe's device cpu, got meta",
        ),
        (
            {"latents": torch.randn(1, 4, 8, 8), "height": 32},
            ValueError,
            r"latents must be a tensor of shape \(1, 4, 16, width\), got \(1, 4, 8, 8\)",
        ),
        (
            {"generator": [torch.Generator()]},
            TypeError,
            "generator must be a torch.Generator or None, got list",
        ),
        (
            {"output_type": "PIL"},
            ValueError,
            "output_type must be one of pil, pt, np, latent, got 'PIL'",
        ),
        ({"sampler": "bdia"}, TypeError, "sampler must be a dict, got str"),
    ],
)
def test_wrong_noise_is_refused_before_anything_is_encoded(
    options: dict, kind: type, sentence: str
) -> None:
    pipe, called = tiny_pipeline(diffusers.StableDiffusionPipeline), []
    pipe.text_encoder.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(kind, match=f"^{sentence}"):
        optimize(pipe, "a cat", torch.mean, num_inference_steps=2, **options)
    assert not called


def test_inversions_of_another_pipeline_are_refused() -> None:
    pipe = pipeline("sd")
    found = invert(pipe, IMAGE, "a cat", num_inference_steps=2)
    other = other_unet(in_channels=8, out_channels=8)
    other.vae = diffusers.AutoencoderKL.from_config(
        {**pipe.vae.config, **ALL, "latent_channels": 8}
    )
    with pytest.raises(
        ValueError,
        match=r"the latents of inversion must be of pipe's 4 channels, got shape \(1, 8, 8",
    ):
        reconstruct(pipe, invert(other, IMAGE, "a cat", num_inference_steps=2))
    with pytest.raises(
        ValueError, match="prompt must hold one entry for each of the 1 images, got 2"
    ):
        reconstruct(pipe, found, ["a", "b"])
    with pytest.raises(
        ValueError, match="output_type must be one of pil, pt, np, latent, got 'PIL'"
    ):
        reconstruct(pipe, found, output_type="PIL")
    moved = type(found)(tuple(x.to("meta") for x in found.latents), found.settings, 0.0, None)
    with pytest.raises(
        ValueError, match="the latents of inversion must be on pipe's device cpu, got meta"
    ):
        reconstruct(pipe, moved)
