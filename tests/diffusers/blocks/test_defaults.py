"""Layouts whose caller says nothing, by the family, and blocks that are refused."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, family, run
from pipelines import PROMPT, REGIONS, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import apply_layout
from dense_attn.integrations.diffusers.models import model_of

pytestmark = pytest.mark.usefixtures("one_thread")
CROSS = {"wan", "pixart", "hunyuan_dit", "sana"}
RANGE = {"modulation": "range", "cross_weight": 1.0, "self_weight": 0.3, "active": 0.3}
RANGE |= {"exponent": 5.0}
JOINT = {"modulation": "bias", "blocks": ["image->text"], "cross_weight": 3.0, "active": 0.5}
JOINT |= {"exponent": 0.0}


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
    ("model", "options", "sentence"),
    [
        ("flux", {"blocks": ()}, r"blocks must name one or more of image->text, .*, got \(\)"),
        ("flux", {"blocks": "image"}, r"blocks must name one or more of .*, got 'image'"),
        ("flux", {"blocks": [0]}, r"blocks must name one or more of .*, got \[0\]"),
        ("flux", {"blocks": 3}, r"blocks must name one or more of .*, got 3"),
        (
            "sd",
            {"blocks": ["image->text", "text->text"]},
            "blocks must be of the image's rows on a UNet2DConditionModel, whose text attends to",
        ),
        (
            "flux",
            {"modulation": "range", "blocks": "image->text"},
            'blocks must have all or none of the pairs of a row under modulation "range", which ch',
        ),
        (
            "flux",
            {"blocks": ("image->text", "image->image"), "self_weight": 1.0},
            r"self_weight must be cross_weight where blocks=.*, for a row .*, got 1.0 and 3.0$",
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
        apply_layout(pipeline(model), PROMPT, **options),
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
