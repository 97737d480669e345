"""Settings: what is refused in a sentence beside which field, and what files keep."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from PIL import Image

from dense_attn.examples.app import canvas, layouts, pictures, settings
from dense_attn.examples.app.models import Model, small_model
from dense_attn.examples.app.refused import FIELDS, Refused
from dense_attn.examples.app.settings import Settings
from dense_attn.integrations.diffusers import Edit, Region

LABELS = canvas.read_boxes("1: 0 0 0.5 0.5\n2: 0.5 0.5 1 1")
GOOD = Settings("", LABELS, ("a red circle", "a blue square"))


@pytest.fixture(scope="module")
def model() -> Model:
    """The small model."""
    return small_model()


def test_the_prompt_is_made_of_the_words() -> None:
    assert GOOD.full_prompt == "a red circle and a blue square"
    assert dataclasses.replace(GOOD, prompt=" a b ").full_prompt == "a b"
    words, box = GOOD.regions()[0]
    assert (words, box) == ("a red circle", (0.0, 0.0, 0.5, 0.5))
    own = dataclasses.replace(GOOD, own_prompts=True).regions()
    assert [type(region) for region in own] == [Region, Region]
    assert dataclasses.replace(GOOD, words=("a red circle", "")).regions()[1][0] is None


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"labels": canvas.empty()}, "canvas", "the canvas must have a painted region, got none"),
    (
        {"words": (*GOOD.words, "a cat")},
        "words",
        "colour 3 (green) must be painted or have no words, got 'a cat'",
    ),
    ({"words": (" ", "")}, "words", "one painted colour at least must have words, got none"),
    (
        {"words": ("a red circle", ""), "own_prompts": True},
        "words",
        "colour 2 (blue) must have a prompt of its own where others have, got none",
    ),
    ({"cross_weight": 9}, "numbers", "cross_weight must be in 0..8, got 9.0"),
    ({"active": 1.5}, "numbers", "active must be in 0..1, got 1.5"),
    ({"steps": 0}, "numbers", "steps must be in 1..100, got 0"),
    ({"steps": 2.5}, "numbers", "steps must be a whole number, got 2.5"),
    ({"guidance": "much"}, "numbers", "guidance must be a number, got 'much'"),
    ({"samples": None}, "numbers", "samples must be a whole number, got None"),
    ({"seed": -2}, "numbers", "seed must be in 0..9223372036854775807, or -1 for any, got -2"),
    (
        {"modulation": "min"},
        "numbers",
        "modulation must be one of range, max, bias, mask, got 'min'",
    ),
    (
        {"edits": (Edit("on white", threshold=2.0),)},
        "edits",
        "threshold of edit 1 must be in 0..1, got 2.0",
    ),
    ({"edits": (Edit("on white"),) * 17}, "edits", "edits must be at most 16, got 17"),
]


@pytest.mark.parametrize(("change", "field", "sentence"), WRONG)
def test_wrong_settings_are_refused(change: dict, field: str, sentence: str) -> None:
    fields = {f.name: getattr(GOOD, f.name) for f in dataclasses.fields(GOOD)}
    settings.settings_of(fields)
    with pytest.raises(Refused) as error:
        settings.settings_of(fields | change)
    assert (error.value.field, str(error.value)) == (field, sentence)
    assert field in FIELDS


UNKNOWN: list[tuple[dict[str, Any], str, str]] = [
    (
        {"words": ("a fox", "an owl")},
        "prompt",
        "the prompt must have words that the model knows, got fox, an, owl",
    ),
    (
        {"prompt": "a thing", "words": ("a fox", "a thing")},
        "words",
        "colour 1 must have words that the model knows, got fox",
    ),
    ({"prompt": "a " * 19}, "prompt", "the prompt must have at most 18 words, got 19"),
    (
        {"edits": (Edit("winter"),)},
        "edits",
        "edit 1 must have words that the model knows, got winter",
    ),
]


@pytest.mark.parametrize(("change", "field", "sentence"), UNKNOWN)
def test_the_small_model_knows_few_words(
    model: Model, change: dict, field: str, sentence: str
) -> None:
    model.check(GOOD)
    with pytest.raises(Refused) as error:
        model.check(dataclasses.replace(GOOD, **change))
    assert (error.value.field, str(error.value)) == (field, sentence)


def test_edits_are_read_from_a_table() -> None:
    rows = [["on white", "12", 0.5, 2, "true"], ["", 1, 1, 1, False], [None, None], ["red", 5, 0.9]]
    with pytest.raises(Refused, match="warm-up of edit 4 must be a number, got None"):
        settings.read_edits(rows)
    (edit,) = settings.read_edits(rows[:3])
    assert edit == Edit("on white", 12.0, 0.5, warmup=2.0, reverse=True)
    assert settings.read_edits(settings.edit_rows([edit])) == (edit,)


def same(a: Settings, b: Settings) -> bool:
    """Whether two settings are equal in every field."""
    return all(
        np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a)
    )


def test_settings_go_into_a_picture_and_come_back(tmp_path: Path) -> None:
    edits = (Edit("on white", 12.0, 0.5, warmup=2.0, reverse=True),)
    made = settings.check(dataclasses.replace(GOOD, edits=edits, steps=7, own_prompts=True))
    text = settings.to_json(made, "a model")
    (tmp_path / "seed.png").write_bytes(pictures.png(Image.new("RGB", (2, 2)), text))
    (tmp_path / "seed.json").write_text(text)
    for name in ("seed.png", "seed.json"):
        found, model = pictures.read_settings(tmp_path / name)
        assert same(found, made)
        assert model == "a model"
    assert not same(found, dataclasses.replace(made, steps=8))


@pytest.mark.parametrize(
    "change",
    [
        {"labels": "eJw="},
        {"labels": None},
        {"words": "a red circle"},
        {"words": [1]},
        {"edits": [1]},
        {"prompt": None},
        {"own_prompts": "no"},
        {"steps": "many"},
        {"steps": "3.0"},
        {"steps": "1e1"},
        {"more": 1},
        {"words": [""] * 33},
    ],
)
def test_files_of_others_are_refused(change: dict, tmp_path: Path) -> None:
    fields = json.loads(settings.to_json(GOOD, "a model")) | change
    path = tmp_path / "file.json"
    path.write_text(json.dumps(fields))
    with pytest.raises(Refused) as error:
        pictures.read_settings(path)
    assert error.value.field == "file"


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"\x89PNG", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_file_of_the_page_is_refused(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(data)
    with pytest.raises(Refused) as error:
        pictures.read_settings(path)
    assert error.value.field == "file"


def test_a_picture_without_settings_is_refused(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(Refused, match="the file must be an image of this page"):
        pictures.read_settings(tmp_path / "a.png")


def test_six_layouts_are_offered(model: Model) -> None:
    offered = layouts.layouts()
    assert len(offered) == 6
    for made in offered:
        model.check(settings.check(made))
