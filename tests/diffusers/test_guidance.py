"""semantic_guidance on whole runs against diffusers' own; invert, reconstruct and optimize."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipelines import PROMPT, REGIONS, close, diffusers, latents, pipeline

from dense_attn import spectral_residual_saliency
from dense_attn.examples._tiny_pipeline import tiny_modular_pipeline, tiny_pipeline
from dense_attn.integrations.diffusers import (
    Edit,
    apply_layout,
    invert,
    optimize,
    reconstruct,
    semantic_guidance,
    semantic_guider,
)

pytestmark = pytest.mark.usefixtures("one_thread")
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
EDITS = {
    "one": [Edit("winter", warmup=1)],
    "away": [
        Edit("winter", scale=4, threshold=0.95, warmup=2, reverse=True),
        Edit("a hat", warmup=1, cooldown=5),
    ],
    "weighted": [Edit("fog", warmup=0, weight=0.3), Edit("a hat", scale=3, warmup=3, weight=2.0)],
}


def theirs(edits: list[Edit], prompts: list[str], **options: float) -> torch.Tensor:
    pipe = tiny_pipeline(diffusers.SemanticStableDiffusionPipeline)
    each = {
        "editing_prompt": [edit.prompt for edit in edits],
        "edit_guidance_scale": [edit.scale for edit in edits],
        "edit_threshold": [edit.threshold for edit in edits],
        "edit_warmup_steps": [edit.warmup for edit in edits],
        "edit_cooldown_steps": [99 if edit.cooldown is None else edit.cooldown for edit in edits],
        "edit_weights": [edit.weight for edit in edits],
        "reverse_editing_direction": [edit.reverse for edit in edits],
    }
    return pipe(
        prompts,
        num_inference_steps=8,
        latents=NOISE[: len(prompts)],
        output_type="latent",
        **each,
        **options,
    ).images


@pytest.mark.filterwarnings("ignore:edits.*warmup must be at most")  # fewer steps than that
@pytest.mark.parametrize("edits", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("count", [1, 2])
def test_latents_are_those_of_diffusers_own_pipeline(edits: list[Edit], count: int) -> None:
    """A near tie at a threshold would part the two; these seeds have none."""
    pipe, prompts = pipeline("sd"), ["a castle", "two dogs"][:count]
    given = {"latents": NOISE[:count], "height": 16, "width": 16, "steps": 8}
    with semantic_guidance(pipe, edits, momentum_scale=0.3, momentum_beta=0.6):
        ours = latents(pipe, prompts, **given)
        assert torch.equal(latents(pipe, prompts, **given), ours)
    assert close(ours, theirs(edits, prompts, edit_momentum_scale=0.3, edit_mom_beta=0.6))
    plain = latents(pipe, prompts, **given)
    assert not close(ours, plain)
    with semantic_guidance(pipe, [Edit("fog", scale=0.0)], momentum_scale=0.0):
        assert close(latents(pipe, prompts, **given), plain)


@pytest.mark.filterwarnings("ignore:edits.*warmup must be at most")  # fewer steps than that
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_it_composes_with_a_layout(model: str) -> None:
    """In either order, with the concepts in the layout's batch but not under it."""
    pipe, edits = pipeline(model), [Edit("fog", warmup=1), Edit("snow", warmup=2, reverse=True)]
    with semantic_guidance(pipe, edits), apply_layout(pipe, PROMPT, REGIONS):
        one = latents(pipe)
    with apply_layout(pipe, PROMPT, REGIONS), semantic_guidance(pipe, edits):
        other = latents(pipe)
        counts = []
        handle = pipe.unet.conv_in.register_forward_hook(
            lambda _module, _args, out: counts.append(len(out))
        )
        latents(pipe, num_images_per_prompt=3, steps=2)
        handle.remove()
    assert torch.equal(one, other)
    assert counts == [3 * 4] * 2  # one call of the U-Net a step
    with (
        semantic_guidance(pipe, [Edit("fog", scale=0.0)], momentum_scale=0.0),
        apply_layout(pipe, PROMPT, REGIONS),
    ):
        with_nothing = latents(pipe)
    with apply_layout(pipe, PROMPT, REGIONS):
        assert close(with_nothing, latents(pipe))


def test_a_modular_pipeline_has_the_same_latents() -> None:
    """Each run from a momentum of its own, each image of a prompt under each concept."""
    pipe, modular = tiny_pipeline(diffusers.StableDiffusionXLPipeline), tiny_modular_pipeline()
    modular.update_components(scheduler=pipe.scheduler)
    edits, noise = (
        EDITS["away"],
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)),
    )
    given = {
        "prompt": "a castle",
        "num_inference_steps": 8,
        "height": 16,
        "width": 16,
        "latents": noise,
    }
    given["num_images_per_prompt"] = 2
    plain = modular(**given, output="latents")
    guider = semantic_guider(modular, edits, 6.0, momentum_scale=0.3, momentum_beta=0.6)
    with semantic_guidance(pipe, edits, momentum_scale=0.3, momentum_beta=0.6):
        expected = pipe(**given, guidance_scale=6.0, output_type="latent").images
    for each in (guider, guider, guider.new()):
        modular.update_components(guider=each)
        assert close(modular(**given, output="latents"), expected)
    assert not close(plain, expected)
    modular.update_components(guider=guider.new(edit_threshold=0.5))
    assert not close(modular(**given, output="latents"), expected)
    assert "edit_threshold" in repr(guider)
    guider.disable()
    data = {
        "prompt_embeds": (torch.ones(1), torch.zeros(1)),
        "text_embeds": (torch.ones(1), torch.zeros(1)),
    }
    (batch,) = guider.prepare_inputs(data)
    batch.noise_pred = torch.ones(2)
    assert guider([batch]).pred is batch.noise_pred


def test_wrong_guiders_are_refused() -> None:
    modular = tiny_modular_pipeline()
    for call, sentence in (
        (
            lambda: semantic_guider(pipeline("sdxl"), EDITS["one"]),
            "pipe must be a modular pipeline with a guider, got StableDiffusionXLPipeline",
        ),
        (lambda: semantic_guider(modular, []), "edits must be a list of Edit"),
        (lambda: semantic_guider(modular, EDITS["one"], "7"), "guidance_scale must be a number"),
        (lambda: semantic_guider(modular, [Edit("a", threshold=2.0)]), "threshold"),
        (
            lambda: semantic_guidance(modular, EDITS["one"]).__enter__(),
            "pipe must have an encode_prompt of a prompt, got",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=sentence):
            call()


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_images_come_back(scheduler: str, prediction: str) -> None:
    """The latents of the image, to the grid's rounding, whatever the pipeline's scheduler."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    config = dict(pipe.scheduler.config) | {"prediction_type": prediction}
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(config)
    images = torch.rand(2, 3, 16, 16)
    inversion = invert(pipe, images, ["a cat", "a dog"], num_inference_steps=10)
    with torch.no_grad():
        encoded = (
            pipe.vae.encode(2 * images - 1).latent_dist.mode() * pipe.vae.config.scaling_factor
        )
    again = reconstruct(pipe, inversion, output_type="latent")
    torch.testing.assert_close(again, encoded.double(), rtol=0, atol=1e-6)
    assert torch.equal(reconstruct(pipe, inversion, output_type="latent"), again)
    assert not close(reconstruct(pipe, inversion, ["a dog", "a cat"], output_type="latent"), again)
    assert inversion.seconds > 0
    assert inversion.peak_bytes is None or inversion.peak_bytes > 0


def test_pictures_in_and_out() -> None:
    from PIL import Image

    pipe = pipeline("sd")
    picture = Image.fromarray(np.full((16, 16, 3), 128, np.uint8))
    images = reconstruct(pipe, invert(pipe, picture, "a cat", num_inference_steps=2, method="bdia"))
    assert [image.size for image in images] == [(16, 16)]
    grey = invert(pipe, picture.convert("L"), "a cat", num_inference_steps=2, method="bdia")
    assert reconstruct(pipe, grey)[0].tobytes() == images[0].tobytes()


@pytest.mark.parametrize("saliency", [None, spectral_residual_saliency])
def test_optimisation_lowers_a_loss(saliency: object) -> None:
    pipe = pipeline("sd")
    result = optimize(
        pipe,
        "a cat",
        lambda image: (image - 0.5).square().mean(),
        saliency,
        num_inference_steps=4,
        guidance_scale=2.0,
        steps=8,
        clip=3e-2,
        progress=False,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    )
    assert result.images.shape == (1, 3, 16, 16)
    assert len(result.result.losses) == 8
    assert result.result.losses[-1] < result.result.losses[0]
    assert all(parameter.grad is None for parameter in pipe.unet.parameters())


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        (
            {"prompt": ["a", "b"]},
            ValueError,
            "prompt must hold one entry for each of the 1 images, got 2",
        ),
        ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings"),
        (
            {"negative_prompt": None},
            TypeError,
            "negative_prompt must be a string or a list of strings",
        ),
        ({"guidance_scale": "3"}, TypeError, "guidance_scale must be a number"),
        ({"mix": 2.0}, ValueError, "mix must be"),
        ({"dtype": torch.float32}, ValueError, "a further argument must be one of method, mix"),
        (
            {"num_inference_steps": 0},
            ValueError,
            "num_inference_steps must be a whole number of at least 1, got 0",
        ),
        ({"num_inference_steps": "4"}, ValueError, "num_inference_steps must be a whole number"),
        ({"image": torch.rand(1, 1, 16, 16)}, ValueError, r"image must have shape \(B, 3, H, W\)"),
        (
            {"image": 255 * torch.rand(1, 3, 16, 16)},
            ValueError,
            "image must be a tensor of floats in 0..1, got values",
        ),
        (
            {"image": torch.ones(1, 3, 16, 16, dtype=torch.uint8)},
            TypeError,
            "image must be a tensor of floats",
        ),
        ({"image": []}, TypeError, "image must be a PIL image, a list of them or a tensor"),
    ],
)
def test_wrong_inversions_are_refused(options: dict, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        invert(
            pipeline("sd"),
            **{"image": torch.rand(1, 3, 16, 16), "prompt": "a cat", "num_inference_steps": 2}
            | options,
        )


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings"),
        ({"prompt": []}, ValueError, "prompt must hold at least one, got none"),
        ({"height": 17}, ValueError, "height must be a positive multiple of 2, got 17"),
        ({"width": "16"}, ValueError, "width must be a positive multiple of 2"),
        (
            {"latents": torch.randn(2, 4, 8, 8)},
            ValueError,
            r"latents must be a tensor of shape \(1, 4, hei",
        ),
        ({"latents": "x"}, ValueError, "latents must be a tensor of shape"),
    ],
)
def test_wrong_optimisations_are_refused(options: dict, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        optimize(
            pipeline("sd"),
            **{"prompt": "a cat", "loss_fn": torch.mean, "num_inference_steps": 2} | options,
        )


def test_chains_are_refused_inside_of_blocks_and_on_other_schedules() -> None:
    pipe, image = tiny_pipeline(diffusers.StableDiffusionPipeline), torch.rand(1, 3, 16, 16)
    for block in (apply_layout(pipe, PROMPT, REGIONS), semantic_guidance(pipe, [Edit("fog")])):
        with (
            block,
            pytest.raises(
                ValueError, match="pipe must be outside of apply_layout and semantic_guidance"
            ),
        ):
            invert(pipe, image, "a cat", num_inference_steps=2)
    invert(pipe, image, "a cat", num_inference_steps=2)
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match=r"noise schedule .betas., got EDMEulerScheduler"):
        invert(pipe, image, "a cat", num_inference_steps=2)


def test_concepts_inside_of_concepts() -> None:
    """The innermost block counts; a guidance scale that a callback changes is heard."""
    pipe = pipeline("sd")
    with semantic_guidance(pipe, EDITS["one"]):
        alone = latents(pipe)
        with semantic_guidance(pipe, EDITS["away"]):
            inner = latents(pipe)
        assert torch.equal(latents(pipe), alone)
    with semantic_guidance(pipe, EDITS["away"]):
        assert torch.equal(latents(pipe), inner)

        def weaker(pipe: object, step: int, time: object, tensors: dict) -> dict:
            pipe._guidance_scale = 2.0
            return tensors

        assert not close(latents(pipe, callback_on_step_end=weaker), inner)
