"""Refusals of layouts and edits, before anything is touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from pipelines import PROMPT, REGIONS, diffusers, latents, pipeline, state_of

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import (
    Edit,
    apply_layout,
    invert,
    optimize,
    reconstruct,
    semantic_guidance,
)

pytestmark = pytest.mark.usefixtures("one_thread")
MASK = np.ones((8, 8), bool)


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        (
            {"regions": [("bird", MASK)]},
            ValueError,
            r"\[0\] must have a phrase of the prompt 'a cat dog', got 'bird'",
        ),
        (
            {"regions": [("", MASK)]},
            ValueError,
            r"regions\[0\] must have a phrase of at least one token, got ''",
        ),
        (
            {"regions": [("cat", MASK), ("dog", ~MASK)]},
            ValueError,
            r"\[1\] must have a mask of at least one pixel",
        ),
        (
            {"regions": [("cat", MASK), ("dog", MASK[1:])]},
            ValueError,
            r"\[1\] must have a mask of the size \(8, 8\)",
        ),
        (
            {"regions": [("cat", MASK)] * 33},
            ValueError,
            "regions must hold 1 to 32 regions, got 33",
        ),
        (
            {"regions": [("cat", MASK.astype(float))]},
            TypeError,
            r"\[0\] must have a bool mask, .* ndarray of float64",
        ),
        (
            {"regions": [("cat", MASK[0])]},
            ValueError,
            r"regions\[0\] must have a mask of 2 dimensions",
        ),
        (
            {"regions": [("cat", (0.0, 0.0, 2.0, 1.0))]},
            ValueError,
            r"the box of regions\[0\] must have 0 <= x0",
        ),
        ({"regions": [("cat", "left")]}, TypeError, r"regions\[0\] must have a bool mask"),
        (
            {"regions": [("cat", torch.ones(8, 8, dtype=torch.bool).to_sparse())]},
            TypeError,
            r"regions\[0\] must be a strided tensor, got torch.sparse_coo",
        ),
        (
            {"regions": [("cat", torch.ones(8, 8, dtype=torch.bool, device="meta"))]},
            ValueError,
            r"regions\[0\] must hold a mask that can be looked at, got a meta tensor",
        ),
        ({"regions": []}, ValueError, "regions must hold at least one region, got none"),
        ({"regions": "cat"}, TypeError, "regions must be a list of"),
        (
            {"regions": [[("cat", MASK)], [("dog", MASK)]]},
            ValueError,
            "regions must hold one list for each of the 1",
        ),
        (
            {"regions": [("cat", MASK), "dog"]},
            TypeError,
            r"regions\[1\] must be a pair \(phrase, mask\)",
        ),
        ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, got 3"),
        ({"prompt": []}, TypeError, "prompt must be a string or a list of strings"),
        ({"active": 1.5}, ValueError, "active must be from 0 to 1, got 1.5"),
        ({"exponent": -1}, ValueError, "exponent must be at least 0, got -1"),
        ({"self_weight": float("nan")}, ValueError, "self_weight must be finite"),
        (
            {"modulation": "min"},
            ValueError,
            "modulation must be one of range, max, bias, mask, got 'min'",
        ),
        ({"encode_phrases": 1}, TypeError, "encode_phrases must be a bool"),
        ({"isolate": np.zeros(2)}, ValueError, "isolate must stay 0.0 where .*, got array"),
        (
            {"base_ratio": 0, "every": torch.ones(2)},
            ValueError,
            "every must stay 1 where .* tensor",
        ),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)
def test_wrong_layouts_are_refused(arguments: dict, kind: type, sentence: str) -> None:
    pipe = pipeline("sd")
    before = state_of(pipe)
    given = {"prompt": PROMPT, "regions": REGIONS} | arguments
    with pytest.raises(kind, match=sentence), apply_layout(pipe, **given):
        pytest.fail("the block must not run")
    assert state_of(pipe) == before


def refused_layout(pipe: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), apply_layout(pipe, PROMPT, REGIONS):
        pytest.fail("the block must not run")


def test_pipelines_that_are_not_known_are_refused() -> None:
    refused_layout(object(), "pipe must have a UNet2DConditionModel, .*, got object")
    with pytest.raises(ValueError, match=r"pipe must have a UNet2DConditionModel, .*, got object"):
        semantic_guidance(object(), [Edit("fog")]).__enter__()
    for call in (
        lambda pipe: invert(pipe, torch.rand(1, 3, 16, 16), "a"),
        lambda pipe: optimize(pipe, "a", torch.sum),
    ):
        with pytest.raises(
            ValueError, match=r"pipe must have a UNet2DConditionModel, .*, got object"
        ):
            call(object())
    with pytest.raises(TypeError, match="inversion must be what invert returns, got Tensor"):
        reconstruct(pipeline("sd"), torch.zeros(1))


def test_processors_of_another_extension_are_refused() -> None:
    class AttnProcessor2_0:
        def __call__(
            self, attn: object, hidden_states: torch.Tensor, *_: object, **__: object
        ) -> torch.Tensor:
            return hidden_states

    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    before = state_of(pipe)
    refused_layout(
        pipe, "have attention processors that call dispatch_.*, got AttnProcessor2_0 in down"
    )
    assert state_of(pipe) == before


def test_pipelines_of_other_batches_are_refused() -> None:
    """Pipelines that guide by more than two halves, or do not say whether they guide."""
    parts = tiny_pipeline(diffusers.StableDiffusionPipeline).components
    wrong = {
        "StableDiffusionPAGPipeline": (
            "make no estimates beside the prompt's .* .do_perturbed_attention_guidance."
        ),
        "StableDiffusionInstructPix2PixPipeline": (
            "pipe must (have an encode_prompt|make no estimates|tell whether)"
        ),
        "SemanticStableDiffusionPipeline": "pipe must have an encode_prompt of a prompt",
        "StableDiffusionUpscalePipeline": (
            "tell whether it guides .do_classifier_free_guidance., got StableDiffusionUp"
        ),
    }
    for name, sentence in wrong.items():
        pipe = getattr(diffusers, name).__new__(getattr(diffusers, name))
        pipe.__dict__.update(parts)
        before = state_of(pipe)
        refused_layout(pipe, sentence)
        with pytest.raises(ValueError, match=sentence):
            semantic_guidance(pipe, [Edit("fog")]).__enter__()
        assert state_of(pipe) == before


def test_calls_that_do_not_fit_the_layout() -> None:
    """Refused inside of the call, and the pipeline is whole afterwards."""
    pipe = pipeline("sd")
    before = state_of(pipe)
    sentence = "prompt must have one entry or one for each prompt of the call, got 2 for 3"
    with pytest.raises(ValueError, match=sentence), apply_layout(pipe, [PROMPT] * 2, [REGIONS] * 2):
        latents(pipe, [PROMPT] * 3)
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    ("edits", "kind", "sentence"),
    [
        ([], TypeError, "edits must be a list of Edit"),
        (Edit("fog"), TypeError, "edits must be a list of Edit, got Edit"),
        (torch.zeros(2), TypeError, "edits must be a list of Edit, got Tensor"),
        (None, TypeError, "edits must be a list of Edit, got NoneType"),
        (["fog"], TypeError, r"edits\[0\] must be an Edit, got str"),
        ([Edit(3)], TypeError, r"edits\[0\].prompt must be a string, got int"),
        ([Edit("fog", threshold=2.0)], ValueError, r"edits\[0\].threshold must"),
        ([Edit("fog", warmup=-1)], ValueError, r"edits\[0\].warmup must"),
    ],
)
def test_wrong_edits_are_refused(edits: object, kind: type, sentence: str) -> None:
    pipe = pipeline("sd")
    before = state_of(pipe)
    with pytest.raises(kind, match=sentence), semantic_guidance(pipe, edits):
        pytest.fail("the block must not run")
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"guidance_scale": 1.0}, "guidance_scale must be above 1 for semantic guidance, got 1.0"),
        ({"guidance_rescale": 0.5}, "guidance_rescale must be 0 with semantic guidance, got 0.5"),
    ],
)
def test_calls_that_semantic_guidance_cannot_guide(call: dict, sentence: str) -> None:
    pipe = pipeline("sd")
    before = state_of(pipe)
    with pytest.raises(ValueError, match=sentence), semantic_guidance(pipe, [Edit("fog")]):
        latents(pipe, **call)
    assert state_of(pipe) == before
