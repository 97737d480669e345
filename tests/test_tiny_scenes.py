"""The small trained model: its scenes and scores, and that layouts, edits and chains do on it what they should."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dense_attn.examples.tiny_scenes import chains, edits, evaluate, layouts, model, scenes, score, sheet, train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pipe() -> object:
    return model.load_pipeline()


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
    scene = scenes.Scene((scenes.Thing("red", "circle", 9, 9, 4, "small"), scenes.Thing("blue", "square", 22, 22, 6)))
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
    assert layouts.gate(pipe, 8)["both present"] >= 0.8
    rng = random.Random(29)
    drawn = [scenes.draw_scene(rng, 2) for _ in range(6)]
    plain, ours = (
        score.score(score.laid_out(pipe, drawn, range(6), setting, "auto"), drawn)
        for setting in (None, score.LAYOUTS["DenseDiffusion"])
    )
    assert ours["iou"].mean() > plain["iou"].mean() + 0.1
    assert ours["swapped"].mean() < 0.05


def test_kernels_and_reference_have_the_same_scores(pipe: object) -> None:
    assert layouts.same_tables(pipe, 2)["of an image"] < 0.01


def test_matched_strengths(pipe: object) -> None:
    rng = random.Random(31)
    drawn = [scenes.draw_scene(rng, 2) for _ in range(2)]
    found = layouts.matched(pipe, drawn, "auto")
    assert found["without value-range adaptivity"]["cross_weight"] in layouts.TUNED
    assert 0 < found["without area adaptivity"]["cross_weight"] < 1


def test_edits_decide_what_the_prompt_leaves_open(pipe: object) -> None:
    for kind, enough in (("ground", 100), ("colour", 20)):
        own = edits.cases(kind, 4)
        plain = score.generate(pipe, [case.prompt for case in own], range(4))
        assert edits.effect(pipe, own, plain, scale=12.0)["gain"]["mean"] > enough
        assert edits.effect(pipe, own, plain, scale=0.0)["changed"] < 0.01


def test_edits_turn_around(pipe: object) -> None:
    own = edits.cases("size", 4)
    plain = score.generate(pipe, [case.prompt for case in own], range(4))
    assert edits.effect(pipe, own, plain, scale=-12.0)["gain"]["mean"] < -10


def test_phrases_of_partial_captions_are_put_where_they_stand(pipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
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
    options = ["--output", str(tmp_path), "--steps", "1", "--batch", "2", "--processes", "1", "--start", weights]
    train.main(options)
    before, after = (model.weights_of(model.load_pipeline(path)) for path in (None, tmp_path / "weights.safetensors"))
    moved = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert moved == {"unet", "text_encoder"}
    with pytest.raises(SystemExit):
        train.main(options)


def test_the_control_of_edits_begins_with_the_same_image(pipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    own = edits.cases("ground", 2)
    plain = score.generate(pipe, [case.prompt for case in own], range(2))
    monkeypatch.setitem(edits.USUAL, "warmup", score.STEPS + 1)
    torch.testing.assert_close(edits._control(pipe, own), plain, atol=1e-4, rtol=0)
    monkeypatch.setitem(edits.USUAL, "warmup", 2)
    assert edits._gain(edits._control(pipe, own), plain, own)["gain"]["mean"] > 100


def test_the_table_and_plot_of_edits(pipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    for name, values in (("SCALES", (-6.0, 6.0)), ("THRESHOLDS", (0.5,)), ("WARMUPS", (2,))):
        monkeypatch.setattr(edits, name, values)
    found = edits.study(pipe, 2)
    assert all(kind in edits.table(found) for kind in edits.KINDS)
    edits.plot(found, tmp_path / "edits.png")
    assert (tmp_path / "edits.png").stat().st_size > 10_000


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
    grown = [torch.nn.functional.max_pool2d(scenes.masks(scene).float(), 5, 1, 2).bool() for scene in drawn]
    assert sum(bool((masks[0] & masks[1]).any() and (masks[1] & masks[2]).any()) for masks in grown) >= 18
    assert score.score(scenes.render(drawn), drawn)["iou"].mean() > 0.8


def test_chains(pipe: object) -> None:
    errors = chains.inversion(pipe, 1, (4,))["rows"]
    assert errors["exact EDICT"]["4"] < 1e-6 < errors["float16 EDICT"]["4"]
    for goal, ways in chains.optimisation(pipe, 2, 3, ())["goals"].items():
        for way, row in ways.items():
            assert row["loss"][1]["mean"] < row["loss"][0]["mean"], (goal, way)


def test_goals_of_optimisation() -> None:
    """Losses of drawn scenes are what they say, and goals are reached by the right scenes alone."""
    drawn = [scenes.Scene((scenes.Thing(name, "circle", 12, 20, 6),)) for name in ("red", "orange")]
    right = scenes.render(drawn)
    wrong = right.flip(0)
    colour = chains.colour_goal(2)
    assert colour.loss(right * 2 - 1).max() < 0.01 < 0.1 < colour.loss(wrong * 2 - 1).min()
    assert colour.reached(right).all()
    assert not colour.reached(wrong).any()
    away = chains.place_loss(torch.tensor([[20.0, 12.0], [16.0, 9.0]]))(right * 2 - 1)
    assert away.tolist() == pytest.approx([0.0, 5.0], abs=0.01)
    place = chains.place_goal(2)
    near = [torch.roll(right, (y, x), (2, 3)) for y in range(-12, 4, 2) for x in range(-4, 12, 2)]
    assert torch.stack([place.reached(images) for images in near]).any(0).all()
    assert not torch.stack([place.reached(images.flip(1)) for images in near]).any()


def test_the_sheet(pipe: object, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = sheet.shipped_rows()[:1]
    images = sheet.make(rows)
    assert sheet.overlap(images["DenseDiffusion"][0], rows[0]) > sheet.overlap(images["plain"][0], rows[0])
    sheet.draw(rows, images, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def test_training_goes_on_where_it_ended(tmp_path: Path) -> None:
    """One step and then one more: the losses of both, and weights that load."""
    pytest.importorskip("matplotlib")
    for steps in (1, 2):
        train.main(["--output", str(tmp_path), "--steps", str(steps), "--batch", "2", "--processes", "1"])
        assert len(json.loads((tmp_path / "losses.json").read_text())) == steps
    model.load_pipeline(tmp_path / "weights.safetensors")
    assert (tmp_path / "loss.png").exists()


def test_parts_of_an_evaluation_add_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in ("gate", "same"):
        assert evaluate.main(["--quick", "--only", part, "--json", str(tmp_path / "found.json")]) == 0
    results = json.loads((tmp_path / "found.json").read_text())
    assert results.keys() == {"gate", "same", "header"}
    assert "largest difference of a score" in capsys.readouterr().out
