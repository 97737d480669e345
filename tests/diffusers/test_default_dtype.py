"""The integration under other defaults of torch, where diffusers itself can run there."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from pipelines import PROMPT, REGIONS, diffusers, latents, pipeline
from surroundings import DTYPES, SURROUNDINGS, assert_same, surrounded

from dense_attn import spectral_residual_saliency
from dense_attn.benchmarks.layout_attention import workloads
from dense_attn.examples._tiny_pipeline import tiny_modular_pipeline
from dense_attn.examples.tiny_scenes import model, scenes, score, sheet
from dense_attn.integrations.diffusers import (
    Edit,
    apply_layout,
    invert,
    optimize,
    reconstruct,
    semantic_guidance,
    semantic_guider,
)

EDITS = [
    Edit("smiling", scale=3.3, warmup=1, weight=0.7),
    Edit("hat", threshold=0.8, warmup=0, reverse=True),
]
Run = Callable[[], object]


def layout_of(model: str, scheduler: str | None = None) -> Run:
    pipe = pipeline(model)

    def run() -> object:
        before = pipe.scheduler
        if scheduler is not None:
            pipe.scheduler = getattr(diffusers, scheduler).from_config(before.config)
        try:
            with apply_layout(pipe, PROMPT, REGIONS, active=1.0):
                return latents(pipe, steps=3)
        finally:
            pipe.scheduler = before

    return run


def concepts() -> Run:
    pipe = pipeline("sd")

    def run() -> object:
        with semantic_guidance(pipe, EDITS):
            return latents(pipe, steps=4)

    return run


def guider() -> Run:
    pipe = tiny_modular_pipeline()

    def run() -> object:
        pipe.update_components(guider=semantic_guider(pipe, EDITS, 5.0))
        options = {
            "height": 16,
            "width": 16,
            "output": "latents",
            "generator": torch.Generator().manual_seed(0),
        }
        return pipe(prompt="a face", num_inference_steps=3, **options)

    return run


def round_trip() -> Run:
    pipe, image = pipeline("sd"), torch.rand(1, 3, 16, 16)

    def run() -> object:
        inversion = invert(pipe, image, "a cat", num_inference_steps=3)
        images = [
            reconstruct(pipe, inversion, prompt, output_type="pt") for prompt in (None, "a dog")
        ]
        return inversion.latents, images

    return run


def optimisation() -> Run:
    pipe = pipeline("sd")

    def run() -> object:
        torch.manual_seed(0)
        options = {"num_inference_steps": 2, "steps": 1, "progress": False, "output_type": "pt"}
        found = optimize(pipe, "a cat", lambda x: x.mean(), spectral_residual_saliency, **options)
        return found.images, found.result

    return run


def small_scenes() -> Run:
    """The parts of the demo and of the small model's scores."""
    names, regions = ["a red circle", "a blue square"], torch.rand(2, 64, 64) > 0.5
    smallest = min(workloads.WORKLOADS.values(), key=lambda one: one.seqlen_q * one.seqlen_k)

    def run() -> object:
        drawn = [scenes.draw_scene(random.Random(i), 2) for i in range(3)]
        images, row = scenes.render(drawn), sheet.users_row(regions, names)
        shapes = [scenes.shape_of(mask) for mask in scenes.masks(drawn[1])]
        found = [
            shapes,
            scenes.masks(drawn[0]),
            scenes.colour_masks(images),
            score.score(images, drawn),
        ]
        return images, row, found, workloads.make_inputs(smallest, torch.float16)

    return run


CASES = {
    "small scenes": small_scenes,
    **{
        f"a layout on {model}": lambda model=model: layout_of(model)
        for model in ("sd", "sdxl", "sd3", "flux")
    },
    "a layout under Euler": lambda: layout_of("sd", "EulerDiscreteScheduler"),
    "concepts": concepts,
    "a guider": guider,
    "a round trip": round_trip,
    "optimised noise": optimisation,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_latents_are_those_of_float32(case: str, dtype: torch.dtype) -> None:
    run = CASES[case]()
    expected = run()
    with surrounded(dtype):
        got = run()
    assert_same(got, expected)


@pytest.mark.parametrize("by", SURROUNDINGS, ids=str)
def test_the_small_model_is_in_float32(by: torch.dtype | torch.device) -> None:
    def weights() -> list[object]:
        pipe = model.load_pipeline()
        return [
            dict(pipe.unet.state_dict()),
            dict(pipe.text_encoder.state_dict()),
            pipe.vae.dtype,
            pipe.vae.device,
        ]

    expected = weights()
    with surrounded(by):
        got = weights()
    assert_same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model", ["sd", "sdxl", "sd3", "flux"])
def test_diffusers_itself_runs_there(model: str, dtype: torch.dtype) -> None:
    expected = latents(pipeline(model), steps=2)
    with surrounded(dtype):
        assert_same(latents(pipeline(model), steps=2), expected)
