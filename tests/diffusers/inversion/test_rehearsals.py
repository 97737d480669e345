"""Rehearsals: their refusals, and the pipeline that stays as it was."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import pytest
import torch
from families import family, made_of
from families.chained import call_of, chain_of, image_of, noise, pipe_of
from families.images import PICTURE
from pipelines import diffusers, pipeline

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import (
    Inversion,
    apply_layout,
    invert,
    optimize,
    reconstruct,
)
from dense_attn.integrations.diffusers.inversion.rehearsal import Scales, rehearse
from dense_attn.integrations.diffusers.inversion.rehearsed import Rehearsed
from dense_attn.integrations.diffusers.inversion.settings import Settings
from dense_attn.integrations.diffusers.models import model_of

pytestmark = pytest.mark.usefixtures("one_thread")
FLUX = {"call": {"max_sequence_length": 24}, "num_inference_steps": 2}


def of_scheduler(scheduler: Any) -> Any:
    """FLUX with another scheduler."""
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    pipe.scheduler = scheduler
    return pipe


def refused(pipe: Any, sentence: str, **options: Any) -> None:
    """Both ways into a chain refuse before the denoiser is called."""
    image = torch.rand(1, 3, 16, 16)
    for call in (
        lambda: invert(pipe, image, "a", **FLUX | options),
        lambda: optimize(pipe, "a", torch.mean, height=16, width=16, **FLUX | options),
    ):
        with pytest.raises((ValueError, TypeError), match=f"^{sentence}"):
            call()


def test_the_pipeline_is_as_it_was() -> None:
    pipe = pipe_of("flux")
    before, config = dict(vars(pipe)), dict(pipe.config)
    scheduler = copy.deepcopy(vars(pipe.scheduler))
    torch.manual_seed(0)
    state, calls = torch.get_rng_state(), []
    handle = pipe.transformer.register_forward_hook(lambda *_: calls.append(1))
    chain_of("flux", 3)
    handle.remove()
    assert vars(pipe) == before
    assert dict(pipe.config) == config
    assert str(vars(pipe.scheduler)) == str(scheduler)
    assert torch.equal(torch.get_rng_state(), state)
    assert calls == []


def test_lists_of_prompts_are_not_written_to() -> None:
    prompts = ["a cat dog"]
    settings = Settings(prompts, "fog", 4.0, 2, call=call_of("z_image"), size=(16, 24))
    Rehearsed(pipe_of("z_image"), settings, 1, noise())
    assert prompts == ["a cat dog"]


def test_schedulers_that_are_no_chain_are_refused() -> None:
    flow = diffusers.FlowMatchEulerDiscreteScheduler
    refused(
        of_scheduler(flow(stochastic_sampling=True)),
        "pipe must have a scheduler that adds no noise, got FlowMatchEulerDiscreteScheduler, stoch",
    )
    heun = copy.copy(pipe_of("sd3"))
    vars(heun)["scheduler"] = diffusers.FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match=r"^pipe.scheduler must have one timestep a step, got .*H"):
        invert(heun, image_of("sd3"), "a", **FLUX)
    sprint = copy.copy(pipe_of("sana"))
    vars(sprint)["scheduler"] = diffusers.SCMScheduler()
    with pytest.raises(ValueError, match=r"^pipe must have a scheduler of .* \(betas\).*, got SCM"):
        invert(sprint, image_of("sana"), "a", num_inference_steps=2)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"call": {"ip_adapter_image": 1}}, "call must be one of .*, got 'ip_adapter_image'"),
        ({"call": {"latents": 1}}, "call must be one of .*, got 'latents'"),
        ({"call": "sigmas"}, "call must be a dict, got str"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"guidance_scale": "7"}, "guidance_scale must be a number"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt must hold one entry for each of the 1"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, Any], sentence: str) -> None:
    refused(pipeline("flux"), sentence, **options)


def test_numbers_that_pipelines_share_are_told_apart() -> None:
    """The scale of FLUX's embedding is an argument of its call, that of SD3's guidance is not."""
    chain = Rehearsed(
        pipeline("flux"),
        Settings("a", "", None, 1, call={"guidance_scale": 2.0, "max_sequence_length": 24}),
        1,
        noise(),
    )
    assert chain.scale == 1.0
    settings = Settings("a", "", None, 1, call={"guidance_scale": 2.0})
    with pytest.raises(ValueError, match=r"^call must be one of .*, got 'guidance_scale'"):
        Rehearsed(pipe_of("sd3"), settings, 1, noise())


def test_blocks_and_caches_are_refused() -> None:
    regions = [("cat", (0.0, 0.0, 1.0, 1.0))]
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    with apply_layout(pipe, "a cat", regions):
        refused(pipe, "pipe must be outside of apply_layout")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    refused(pipe, "pipe must have no cache between the steps, got FluxPipeline with enable_cache")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("flux2_kv", "pipe must have its guidance's scale in its call or a guider, got Flux2Klein"),
        ("qwen_edit", "pipe must make images of a prompt alone, got .*EditPipeline with image"),
        ("kandinsky5_i2i", "pipe must make images of a prompt alone, got .*I2IPipeline with image"),
    ],
)
def test_other_pipelines_are_refused(name: str, sentence: str) -> None:
    refused(family(name), sentence)


def test_a_pipeline_that_combines_otherwise_is_refused() -> None:
    """Whatever the reason, and in whatever step."""

    class Otherwise(diffusers.StableDiffusion3Pipeline):
        @property
        def guidance_scale(self) -> float:
            return self._guidance_scale * (2 if self.scheduler.config.shift == 5 else 1)

    parts = tiny_pipeline(diffusers.StableDiffusion3Pipeline).components
    pipe = Otherwise(**parts)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3)
    options = {"guidance_scale": 4.0, "negative_prompt": "fog"}
    invert(pipe, image_of("sd3"), "a", **FLUX | options)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5)
    with pytest.raises(ValueError, match=r"^pipe must combine .*, got Otherwise, .* in step 0"):
        invert(pipe, image_of("sd3"), "a", **FLUX | options)


def test_a_pipeline_that_gives_more_than_latents_is_refused() -> None:
    """Tokens of an image behind the latents, which a chain's latents have not."""
    pipe, given = family("flux2"), {"prompt": "a", "image": PICTURE, "guidance_scale": 1.0}
    given |= made_of("flux2")[1] | {"num_inference_steps": 1}
    scheduler = copy.deepcopy(pipe.scheduler)
    with pytest.raises(ValueError, match=r"^pipe must give its denoiser the latents and nothing"):
        rehearse(pipe, model_of(pipe), scheduler, Scales(1.0, 1.0), given)


def test_inversions_of_another_kind_are_refused() -> None:
    """In one sentence, before a prompt is encoded: of videos, images, other denoisers, XL."""
    kinds = {
        "wan": "WanTransformer3DModel",
        "ltx": "LTXVideoTransformer3DModel",
        "sd3": "SD3Transformer2DModel",
        "sd": "UNet2DConditionModel",
        "sdxl": "UNet2DConditionModel (text_time)",
    }
    latents, seen = (torch.zeros(1, 4, 8, 8, dtype=torch.float64),) * 2, []
    for name, kind in kinds.items():
        pipe = copy.copy(pipe_of(name))
        vars(pipe)["encode_prompt"] = lambda **given: seen.append(given)
        for other in kinds.values():
            if other != kind:
                found = Inversion(latents, Settings("a", "", None, 2), 0.0, None, other)
                sentence = f"inversion must be of a pipeline of {kind}, got one of {other}"
                with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
                    reconstruct(pipe, found)
    assert not seen


@pytest.mark.parametrize(
    ("name", "size", "frames", "sentence"),
    [
        ("sd3", (16, 16), 5, "inversion must be of images, which pipe makes, got one of videos"),
        ("sd", (16, 16), 5, "inversion must be of images, which pipe makes, got one of videos"),
        (
            "wan",
            (32, 48),
            None,
            "inversion must be of videos, which pipe makes, got one of images",
        ),
        ("sd3", (18, 24), None, "inversion must be of sides of multiples of 4, got 24 x 18"),
        ("wan", (32, 40), 5, "inversion must be of sides of multiples of 16, got 40 x 32"),
        ("wan", (32, 48), 4, "the number of frames of inversion must be 1 above a multiple of 4"),
    ],
)
def test_inversions_that_no_pipeline_of_this_kind_made(
    name: str, size: tuple[int, int], frames: int | None, sentence: str
) -> None:
    """Nor do those of before tell their kind."""
    latents = (torch.zeros(1, 4, 8, 8, dtype=torch.float64),) * 2
    settings = Settings("a", "", None, 2, size=size, frames=frames)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        reconstruct(pipe_of(name), Inversion(latents, settings, 0.0, None))


def test_inversions_of_before_are_still_taken() -> None:
    """Pickles that lack a field have its default."""
    pipe = pipeline("flux")
    found = invert(pipe, torch.rand(1, 3, 16, 24), "a", **FLUX)
    assert found.denoiser == "FluxTransformer2DModel"
    old = copy.copy(found)
    del vars(old)["denoiser"]
    again = pickle.loads(pickle.dumps(old))
    expected = reconstruct(pipe, found, output_type="latent")
    assert torch.equal(reconstruct(pipe, again, output_type="latent"), expected)


def test_inversions_of_another_size_are_refused() -> None:
    pipe = pipeline("flux")
    found = invert(pipe, torch.rand(1, 3, 16, 24), "a", **FLUX)
    other = type(found)(tuple(x[:, :-1] for x in found.latents), found.settings, 0.0, None)
    with pytest.raises(ValueError, match=r"^the latents of inversion must have pipe's shape"):
        reconstruct(pipe, other)
    with pytest.warns(
        UserWarning, match="multiples of 4 .*, got 27 x 17: it is resized to 24 x 16"
    ):
        found = invert(pipe, torch.rand(1, 3, 17, 27), "a", **FLUX)
    assert found.settings.size == (16, 24)
