"""The small trained model: scenes, captions, scores, layouts, its sheet and its training."""

from __future__ import annotations

import itertools
import json
import random
from importlib import resources
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dense_attn.examples.tiny_scenes import layouts, model, scenes, score, sheet, train

pytestmark = pytest.mark.usefixtures("one_thread")


def test_scenes_are_found_in_their_pictures() -> None:
    rng = random.Random(0)
    drawn = [scenes.draw_scene(rng, count) for count in (1, 2, 3) * 20]
    images = scenes.render(drawn)
    scores = score.score(images, drawn)
    assert scores["present"].all()
    assert scores["iou"].mean() > 0.85
    assert scores["swapped"][1::3].max() < 0.01  # pairs: the things of a scene do not overlap
    assert scores["off_palette"].max() < 0.1
    found = scenes.colour_masks(images)
    for b, scene in enumerate(drawn):
        for thing in scene.things:
            assert scenes.shape_of(found[thing.colour][b]) == thing.shape
    wrong = score.score(images.roll(1, 1), drawn)  # the negative control: other colours
    assert wrong["present"].mean() < 0.5


def test_pairs_are_kept_out_of_training() -> None:
    rng = random.Random(1)
    for unseen in (True, False):
        for _ in range(50):
            first, second = scenes.draw_scene(rng, 2, unseen=unseen).things
            assert scenes.held_out(first, second) == scenes.held_out(second, first) == unseen


def test_captions_are_one_token_a_word() -> None:
    words, tokenizer = model.SPECIAL + scenes.WORDS, model.tokenizer()
    scene = scenes.Scene(
        (scenes.Thing("red", "circle", 9, 9, 4, "small"), scenes.Thing("blue", "square", 22, 22, 6))
    )
    tokens = tokenizer(scene.caption).input_ids
    assert [words[token] for token in tokens[1:-1]] == [
        "a",
        "small",
        "red",
        "circle",
        "and",
        "a",
        "blue",
        "square",
        "on",
        "gray",
    ]
    assert words[tokenizer("a pony").input_ids[2]] == "<unknown>"


def test_nothing_is_lost_in_latents() -> None:
    images = torch.rand(2, 3, 32, 32)
    latents = model.PixelLatents().encode(images).latent_dist.sample()
    assert latents.shape == (2, 12, 16, 16)
    assert torch.equal(model.PixelLatents().decode(latents).sample, images)


def test_weights_are_small() -> None:
    weights = resources.files("dense_attn.examples.tiny_scenes") / model.WEIGHTS
    assert Path(str(weights)).stat().st_size <= 12e6


def test_the_gate_and_layouts(pipe: object) -> None:
    """On few scenes: both things there without a layout, and where the layout says with one."""
    assert layouts.gate(pipe, 4)["both present"] >= 0.8
    rng = random.Random(29)
    drawn = [scenes.draw_scene(rng, 2) for _ in range(4)]
    plain, ours = (
        score.score(score.laid_out(pipe, drawn, range(4), setting, "auto"), drawn)
        for setting in (None, score.LAYOUTS["DenseDiffusion"])
    )
    assert ours["iou"].mean() > plain["iou"].mean() + 0.1
    assert ours["swapped"].mean() < 0.05


def test_matched_strengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight whose images overlap best is taken; DenseDiffusion keeps its own."""
    drawn = [scenes.draw_scene(random.Random(31), 2) for _ in range(2)]

    def painted(_: object, given: list, seeds: list, setting: dict, backend: str) -> torch.Tensor:
        right = setting["cross_weight"] == (16.0 if "modulation" in setting else 0.75)
        return scenes.render(given) if right else torch.full((len(given), 3, 32, 32), 0.5)

    monkeypatch.setattr(layouts, "laid_out", painted)
    settings, tried = layouts.matched(None, drawn, "auto")
    assert settings["without value-range adaptivity"] == {
        "modulation": "bias",
        "cross_weight": 16.0,
        "self_weight": pytest.approx(4.8),
    }
    assert settings["without area adaptivity"]["cross_weight"] == 0.75
    assert settings[layouts.CHOSEN]["cross_weight"] == 0.75
    assert settings["DenseDiffusion"] == {}
    assert tried[layouts.CHOSEN]["0.75"] > 0.8 > tried[layouts.CHOSEN]["1.0"]


def test_differences_are_paired() -> None:
    """The error of a difference is that of the differences, not of both means."""
    rows = {
        name: dict.fromkeys(layouts.METRICS, torch.tensor(values))
        for name, values in {
            "plain": [0.0, 0.5, 1.0],
            "DenseDiffusion": [0.1, 0.6, 1.1],
        }.items()
    }
    row = layouts.row("DenseDiffusion", rows, 3, ("plain", "DenseDiffusion"))
    assert row["iou"]["error"] == pytest.approx(0.5 / 3**0.5)
    assert row["iou - plain"] == pytest.approx({"mean": 0.1, "error": 0.0}, abs=1e-6)
    assert row["iou - DenseDiffusion"] == {"mean": 0.0, "error": 0.0}


def test_training_sees_no_held_out_pair() -> None:
    rng = random.Random(3)
    drawn = [train._draw(rng).things for _ in range(300)]
    assert {len(things) for things in drawn} == {1, 2, 3}
    assert not any(
        scenes.held_out(*pair) for things in drawn for pair in itertools.combinations(things, 2)
    )


def test_phrases_of_partial_captions_are_put_where_they_stand(
    pipe: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, share in (("EMPTY", 0.0), ("ALONE", 1.1), ("PARTLY", 1.1)):
        monkeypatch.setattr(train, name, share)
    said = (["a red thing", "a large circle"], "white")
    monkeypatch.setattr(train, "left_out", lambda rng, scene: said)
    scene = scenes.draw_scene(random.Random(0), 2)
    text = train.encode(pipe, [scene], random.Random(0))[0]
    for phrase, start in zip(said[0], (1, 5)):
        alone = pipe.encode_prompt(phrase, "cpu", 1, False)[0][0]
        torch.testing.assert_close(text[start : start + 3], alone[1:4])


def test_training_begins_with_given_weights(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    weights = str(resources.files("dense_attn.examples.tiny_scenes") / model.WEIGHTS)
    options = [
        "--output",
        str(tmp_path),
        "--steps",
        "1",
        "--batch",
        "2",
        "--processes",
        "1",
        "--start",
        weights,
    ]
    train.main(options)
    before, after = (
        model.weights_of(model.load_pipeline(path))
        for path in (None, tmp_path / "weights.safetensors")
    )
    moved = {
        name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])
    }
    assert moved == {"unet", "text_encoder"}
    away = max((after[name] - value).abs().max().item() for name, value in before.items())
    assert away < 2 * train.RATE  # one step of AdamW
    with pytest.raises(SystemExit):
        train.main(options)


def test_captions_leave_things_open() -> None:
    """Every word of a caption that leaves something out is one of the whole one's, or "thing"."""
    rng, shorter = random.Random(2), 0
    for _ in range(100):
        scene = scenes.draw_scene(rng, 3)
        said = scenes.caption(*scenes.left_out(rng, scene)).split()
        assert set(said) <= {*scene.caption.split(), "thing"}
        shorter += len(said) < len(scene.caption.split())
    assert shorter > 50


def test_things_that_touch_hide_each_other() -> None:
    rng = random.Random(4)
    drawn = [scenes.draw_scene(rng, 3, colours=layouts.SIMILAR, touching=True) for _ in range(20)]
    assert all(scenes.masks(scene).sum(0).max() == 1 for scene in drawn)
    grown = [
        torch.nn.functional.max_pool2d(scenes.masks(scene).float(), 5, 1, 2).bool()
        for scene in drawn
    ]
    assert (
        sum(bool((masks[0] & masks[1]).any() and (masks[1] & masks[2]).any()) for masks in grown)
        >= 18
    )
    assert score.score(scenes.render(drawn), drawn)["iou"].mean() > 0.8


def test_the_sheet(pipe: object, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = sheet.shipped_rows()[:1]
    images = sheet.make(rows)
    assert sheet.overlap(images["DenseDiffusion"][0], rows[0]) > sheet.overlap(
        images["plain"][0], rows[0]
    )
    sheet.draw(rows, images, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_rows_that_the_model_cannot_paint() -> None:
    """Each reason is said instead of an error from the depths."""
    half = torch.zeros(2, 64, 64, dtype=torch.bool)
    half[0, :32], half[1, 32:] = True, True
    fine = sheet.users_row(half, ["a red circle", "a blue square"])
    assert sheet.why_not(fine) == []
    assert all(sheet.why_not(row) == [] for row in sheet.shipped_rows())
    (unknown,) = sheet.why_not(sheet.users_row(half, ["a red fox", "a blue fox"]))
    assert unknown.endswith("; not fox")
    many = torch.ones(5, 64, 64, dtype=torch.bool)
    (long,) = sheet.why_not(sheet.users_row(many, ["a red circle"] * 5))
    assert long.startswith("it reads 18 words, got 19 in 'a red circle and")
    half[1] = False
    half[1, 63, 63] = True
    assert sheet.why_not(sheet.users_row(half, fine.phrases)) == [
        "no pixel of 32 x 32 is left of a blue square"
    ]


def test_two_regions_of_one_colour_share_it() -> None:
    drawn = scenes.Scene(
        (scenes.Thing("red", "circle", 8, 8, 6), scenes.Thing("red", "square", 24, 24, 6))
    )
    row = sheet.Row(drawn.caption, drawn.phrases, scenes.masks(drawn), scenes.render([drawn])[0])
    assert sheet.overlap(row.picture, row) > 0.8
    assert sheet.overlap(row.picture.flip(2), row) < 0.05


def test_training_goes_on_where_it_ended(tmp_path: Path) -> None:
    """One step and then one more: the losses of both, and weights that load."""
    pytest.importorskip("matplotlib")
    kept = []
    for steps in (1, 2):
        train.main(
            ["--output", str(tmp_path), "--steps", str(steps), "--batch", "2", "--processes", "1"]
        )
        assert len(json.loads((tmp_path / "losses.json").read_text())) == steps
        kept.append(torch.load(tmp_path / "checkpoint.pt"))
    first, second = (state["weights"]["unet.conv_in.weight"] for state in kept)
    # from the first step's weights, not from new ones
    assert 0 < (second - first).abs().max() < 2 * train.RATE
    assert kept[1]["optimisers"][0]["state"][0]["step"] == 2
    assert kept[1]["losses"][0] == kept[0]["losses"][0]
    model.load_pipeline(tmp_path / "weights.safetensors")
    assert (tmp_path / "loss.png").exists()
