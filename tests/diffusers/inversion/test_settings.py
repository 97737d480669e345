"""Settings that no chain would heed are refused: sizes, guidance, negative prompts, calls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from families import family
from pipelines import IMAGE, pipeline

from dense_attn.integrations.diffusers import invert, optimize

pytestmark = pytest.mark.usefixtures("one_thread")
OWN = {"flux": {"max_sequence_length": 24}, "sd3": {"max_sequence_length": 24}}
STEPS = {"num_inference_steps": 2}
RUN = STEPS | {"steps": 0, "progress": False, "output_type": "latent"}


def inverted(name: str, call: dict[str, Any] | None = None, **options: Any) -> Any:
    call = OWN.get(name, {}) | (call or {})
    return invert(pipeline(name), IMAGE, "a cat", **STEPS | options, call=call)


def optimized(name: str, **options: Any) -> Any:
    call = OWN.get(name, {})
    return optimize(pipeline(name), "a cat", torch.mean, **RUN | options, call=call)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux"])
def test_negative_prompts_without_guidance_are_refused(name: str) -> None:
    sentence = r"^negative_prompt must be empty where guidance_scale is 1 \(no guidance\), got \['"
    with pytest.raises(ValueError, match=sentence):
        inverted(name, negative_prompt="fog", guidance_scale=1)
    with pytest.raises(ValueError, match=sentence):
        optimized(name, negative_prompt="fog", height=16, width=16)


def test_negative_prompts_of_other_encoders_are_refused_too() -> None:
    with pytest.raises(ValueError, match=r"^call\['negative_prompt_2'\] must be empty where"):
        inverted("sdxl", {"negative_prompt_2": "fog"}, guidance_scale=1)
    with pytest.raises(ValueError, match=r"^negative_prompt must be empty where guidance_scale"):
        inverted("flux", negative_prompt="fog")  # which guides where it is told alone


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_less_than_no_guidance_is_refused(name: str) -> None:
    for scale in (0.5, -1):
        sentence = rf"^guidance_scale must be at least 1 \(no guidance\), got {scale}"
        with pytest.raises(ValueError, match=sentence):
            inverted(name, guidance_scale=scale)


@pytest.mark.parametrize(("name", "unit"), [("sd", 2), ("sdxl", 2), ("sd3", 4), ("flux", 4)])
def test_sides_are_multiples_of_a_token(name: str, unit: int) -> None:
    for side in (0, -16, 17, 16.0, True, "16"):
        for argument in ("height", "width"):
            sentence = f"^{argument} must be a positive multiple of {unit}, got {side!r}"
            with pytest.raises(ValueError, match=sentence):
                optimized(name, **{"height": 16, "width": 16} | {argument: side})


def test_packed_latents_need_a_height_and_a_width() -> None:
    seed = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 24, 16, generator=seed, dtype=torch.float32)  # of 16 x 24 pixels
    for size, missing in (({}, "height"), ({"width": 24}, "height"), ({"height": 16}, "width")):
        with pytest.raises(ValueError, match=f"^{missing} must be given with packed latents"):
            optimized("flux", latents=latents, **size)
    found = optimized("flux", latents=latents, height=16, width=24)
    assert torch.equal(found.result.latents, latents)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            {"prompt_2": ["a", "b"]},
            "prompt_2'] must hold one entry for each of the 1 images, got 2",
        ),
        ({"prompt_2": 3}, "prompt_2'] must be a string or a list of strings, got 3"),
        ({"sigmas": "abc"}, "sigmas'] must hold a number for each of the 2 steps, got 'abc'"),
        ({"sigmas": [1.0, 0.5, 0.2]}, "sigmas'] must hold a number for each of the 2 steps, got 3"),
        ({"sigmas": [1.0, "b"]}, "sigmas'] must be a number, got str"),
        ({"guidance_scale": float("nan")}, "guidance_scale'] must be finite, got nan"),
    ],
)
def test_wrong_arguments_of_a_call_are_refused(call: dict[str, Any], sentence: str) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        inverted("flux", call)
    assert str(caught.value) == f"call['{sentence}"


def test_arguments_of_a_call_are_taken_by_every_road() -> None:
    """A text for all images, sigmas of numpy; sigmas on DDIM's schedule are refused."""
    images = IMAGE.expand(2, -1, -1, -1)
    one, two = (
        invert(pipeline("sdxl"), images, "a cat", **STEPS, call={"prompt_2": text}).latents
        for text in ("a dog", ["a dog", "a dog"])
    )
    assert all(map(torch.equal, one, two))
    one, two = (
        inverted("flux", {"sigmas": sigmas}).latents
        for sigmas in ([0.9, 0.4], np.array([0.9, 0.4]))
    )
    assert all(map(torch.equal, one, two))
    with pytest.raises(ValueError, match=r"^call must be one of prompt_2, .*, got 'sigmas'"):
        inverted("sdxl", {"sigmas": [1.0, 0.5]})


@pytest.mark.parametrize("name", ["sd", "flux"])
def test_whole_numbers_of_numpy_are_taken(name: str) -> None:
    found = inverted(name, num_inference_steps=np.int64(2))
    assert type(found.settings.num_inference_steps) is int
    side = np.int32(16)
    assert optimized(name, height=side, width=side).images.shape[0] == 1
    for steps in (True, 2.0, np.bool_(True)):
        with pytest.raises(ValueError, match=r"^num_inference_steps must be a whole number"):
            inverted(name, num_inference_steps=steps)


def test_calls_that_are_told_of_no_guidance_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^pipe must have its guidance's scale in its call"):
        invert(family("flux2_kv"), IMAGE, "a cat", **STEPS)
