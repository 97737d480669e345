"""Layouts whose caller says nothing, by the family, and blocks that are refused."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from families import FAMILIES, family, run
from pipelines import MODELS, PROMPT, REGIONS, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import apply_layout
from dense_attn.integrations.diffusers.models import model_of

pytestmark = pytest.mark.usefixtures("one_thread")
CROSS = {"wan", "pixart", "hunyuan_dit", "sana"}
RANGE = {"modulation": "range", "cross_weight": 1.0, "self_weight": 0.3, "active": 0.3}
RANGE |= {"exponent": 5.0}
JOINT = {"modulation": "bias", "blocks": ["image->text"], "cross_weight": 3.0, "active": 0.5}
JOINT |= {"exponent": 0.0}
BOTH = ["image->text", "image->image"]


def laid(model: str, **options: object) -> Tensor:
    with apply_layout(pipeline(model), PROMPT, REGIONS, **options):
        return latents(pipeline(model), steps=6)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "flux", *FAMILIES])
def test_each_record_names_its_own(name: str) -> None:
    """Joint attention has what a trial found, and all others DenseDiffusion's."""
    own = model_of(family(name) if name in FAMILIES else pipeline(name)).defaults
    joint = name not in CROSS | {"sd", "sdxl"} and not name.startswith("kandinsky5")
    assert own.modulation == ("bias" if joint else "range")
    assert own.blocks == (
        ("image->text",) if joint else ("image->text", "text->image", "image->image", "text->text")
    )
    numbers = own.cross_weight, own.self_weight, own.active, own.exponent
    assert numbers == ((3.0, None, 0.5, 0.0) if joint else (1.0, 0.3, 0.3, 5.0))


@pytest.mark.parametrize(
    ("model", "own"),
    [("sd", RANGE), pytest.param("sd3", JOINT, marks=pytest.mark.full), ("flux", JOINT)],
)
def test_nothing_said_is_the_familys_own(model: str, own: dict) -> None:
    """Bit for bit, and a modulation that is not the family's has DenseDiffusion's numbers."""
    ours = laid(model)
    assert torch.equal(ours, laid(model, **own))
    assert not torch.equal(ours, latents(pipeline(model), steps=6))
    assert torch.equal(laid(model, modulation="range"), laid(model, **RANGE))
    assert torch.equal(
        laid(model, modulation="bias"), laid(model, **(own | {"modulation": "bias"}))
    )


def test_steps_of_a_joint_model_have_one_strength(calls: list) -> None:
    """The first half of them, words of the image towards those of the text."""
    with apply_layout(family("qwen"), PROMPT, REGIONS):
        run("qwen", PROMPT, steps=6)
    layers = len(family("qwen").transformer.transformer_blocks)
    assert len(calls) == 3 * layers
    assert all(torch.equal(call[5], calls[0][5]) for call in calls)
    assert calls[0][5].max() == 3.0


def test_equal_weights_where_one_is_given() -> None:
    """self_weight is cross_weight unless it is said."""
    blocks = "image->text", "image->image"
    one = laid("flux", blocks=blocks, cross_weight=2.0)
    assert torch.equal(one, laid("flux", blocks=blocks, cross_weight=2.0, self_weight=2.0))
    assert not torch.equal(one, laid("flux", blocks=blocks))


@pytest.mark.parametrize(
    ("given", "one"), [({}, 0.3), ({"self_weight": 0.5}, 0.5), ({"cross_weight": 0.5}, 0.5)]
)
def test_rows_of_one_strength_take_the_weight_that_is_given(given: dict, one: float) -> None:
    """For image->text and image->image alone, in joint attention."""
    right = laid("flux", modulation="range", blocks=BOTH, cross_weight=one, self_weight=one)
    assert torch.equal(laid("flux", modulation="range", blocks=BOTH, **given), right)


def test_regions_without_phrases_are_told_of_where_nothing_is_theirs() -> None:
    """They have no text tokens for image->text."""
    nameless = [(None, (0.0, 0.0, 0.5, 1.0))]
    with (
        pytest.warns(
            UserWarning, match="^regions without a phrase change nothing under blocks="
        ) as told,
        apply_layout(pipeline("flux"), PROMPT, nameless),
    ):
        pass
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"blocks": "image->image"}, {"modulation": "range"}):
            with apply_layout(pipeline("flux"), PROMPT, nameless, **options):
                pass


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        ("flux", {"blocks": ()}, r"blocks must name one or more of image->text, .*, got \(\)"),
        ("flux", {"blocks": "image"}, r"blocks must name one or more of .*, got 'image'"),
        ("flux", {"blocks": [0]}, r"blocks must name one or more of .*, got \[0\]"),
        ("flux", {"blocks": 3}, r"blocks must name one or more of .*, got 3"),
        (
            "sd",
            {"blocks": ["image->text", "text->text"]},
            "blocks must be of the UNet2DConditionModel's own, image->text, image->image, got",
        ),
        (
            "flux",
            {"modulation": "range", "blocks": "image->text"},
            'blocks must have all or none of the pairs of a row under modulation "range", which ch',
        ),
        (
            "flux",
            {"blocks": BOTH, "self_weight": 1.0, "cross_weight": 3},
            r"self_weight must be cross_weight where blocks=.*, for a row .*, got 1.0 and 3.0$",
        ),
        (
            "flux",
            {"self_weight": 7},
            r"self_weight must stay None or 0 where blocks=\('image->text',\), of which none has",
        ),
        (
            "sd",
            {"blocks": "image->image", "cross_weight": 7},
            "cross_weight must stay None or 0 where blocks=.*, of which none has it, got 7.0$",
        ),
        (
            "sana",
            {"blocks": ["image->text", "image->image"]},
            "blocks must be of the SanaTransformer2DModel's own, image->text, got",
        ),
        ("flux", {"cross_weight": 1e300}, "cross_weight must be finite in float32, got 1e\\+300"),
        (
            "flux",
            {"modulation": np.array(["bias", "range"])},
            "modulation must be one of range, .*, got array",
        ),
        (
            "flux",
            {"blocks": ("image->text", "text->image"), "regions": [(None, (0, 0, 1, 1))] * 17},
            r"regions must hold at most 16 regions, of two bits each, under blocks=.*, got 17",
        ),
    ],
)
def test_refusals(model: str, options: dict, sentence: str) -> None:
    options = {"regions": REGIONS} | options
    with (
        pytest.raises(ValueError, match=f"^{sentence}"),
        apply_layout(pipeline(model) if model in MODELS else family(model), PROMPT, **options),
    ):
        pytest.fail("the block must not run")


def test_range_takes_the_rows_of_one_kind_alone(calls: list) -> None:
    """All pairs of the image's rows; those of the text have no strength."""
    blocks = ["image->text", "image->image"]
    options = {"blocks": blocks, "cross_weight": 0.5, "self_weight": 0.5}
    laid("flux", modulation="range", **options)
    strength = calls[0][5].flatten()
    assert not strength[:24].any()
    assert (strength[24:] > 0).any()


def test_more_regions_than_two_bits_have_room_for() -> None:
    """A rectangle of blocks takes one bit a region, and as many as a word has."""
    regions = [(None, (0.0, 0.0, 1.0, 1.0))] * 32
    for blocks in ("image->text", ("image->text", "image->image")):
        with apply_layout(pipeline("flux"), PROMPT, regions, blocks=blocks):
            pass
