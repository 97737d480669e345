"""The small trained model under edits, in exact chains and on both backends, and its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dense_attn._backends import table
from dense_attn.examples.tiny_scenes import (
    edits,
    evaluate,
    goals,
    inversion,
    layouts,
    optimisation,
    scenes,
    score,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a few steps, where nothing is asked of what they show."""
    monkeypatch.setattr(score, "STEPS", 5)


@pytest.mark.full
@pytest.mark.long  # each study twice
@pytest.mark.usefixtures("few_steps")
def test_kernels_and_reference_have_the_same_scores(
    pipe: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images agree to rounding; without kernels each of these would refuse."""
    monkeypatch.setattr(edits, "KINDS", ("colour", "ground"))
    for found in (
        layouts.same_tables(pipe, 2),
        edits.same_tables(pipe, 2),
        optimisation.same_tables(pipe, 2, 2),
    ):
        assert found["backend"] != "reference"
        assert max(value for name, value in found.items() if name.startswith("of ")) < 1e-3, found


def test_without_kernels_nothing_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "resolve", lambda *_: "reference")
    for compare, counts in (
        (layouts.same_tables, (2,)),
        (edits.same_tables, (2,)),
        (optimisation.same_tables, (2, 2)),
    ):
        with pytest.raises(RuntimeError, match="must have a backend that is not the reference"):
            compare(None, *counts)


@pytest.mark.full
def test_edits_decide_what_the_prompt_leaves_open(pipe: object) -> None:
    for kind, enough in (("ground", 100), ("colour", 20)):
        own = edits.open_prompts(kind, 4)
        plain = score.generate(pipe, [case.prompt for case in own], range(4))
        assert edits.effect(pipe, own, plain, scale=12.0)["gain"]["mean"] > enough
        assert edits.effect(pipe, own, plain, scale=0.0)["changed"] < 0.01


@pytest.mark.usefixtures("few_steps")
def test_edits_of_images_without_a_thing(pipe: object) -> None:
    """Nothing is inside of it, and a mean of one image has no error."""
    own = edits.open_prompts("colour", 2)
    bare = torch.full((2, 3, 32, 32), 0.5)
    found = edits.effect(pipe, own, bare)
    assert found["inside"] == {"mean": None, "error": None}
    bare[0, :, 8:16, 8:16] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    found = edits.effect(pipe, own, bare)
    assert found["inside"]["mean"] > 0
    assert score.said(found["inside"], ".2f") == f"{found['inside']['mean']:.2f}"
    assert score.said(edits.effect(pipe, own, bare * 0 + 0.5)["inside"]) == "-"


@pytest.mark.full
def test_edits_turn_around(pipe: object) -> None:
    own = edits.open_prompts("size", 4)
    plain = score.generate(pipe, [case.prompt for case in own], range(4))
    assert edits.effect(pipe, own, plain, scale=-12.0)["gain"]["mean"] < -10


@pytest.mark.full
def test_the_control_of_edits_begins_with_the_same_image(
    pipe: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = edits.open_prompts("ground", 2)
    plain = score.generate(pipe, [case.prompt for case in own], range(2))
    monkeypatch.setitem(edits.USUAL, "warmup", score.STEPS + 1)
    torch.testing.assert_close(edits.swapped(pipe, own), plain, atol=1e-4, rtol=0)
    monkeypatch.setitem(edits.USUAL, "warmup", 2)
    assert edits._gain(edits.swapped(pipe, own), plain, own)["gain"]["mean"] > 100


@pytest.mark.full
@pytest.mark.usefixtures("few_steps")
def test_the_table_and_plot_of_edits(
    pipe: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    for name, values in (
        ("SCALES", (-6.0, 6.0)),
        ("THRESHOLDS", (0.5,)),
        ("WARMUPS", (2,)),
        ("KINDS", ("colour", "size")),
    ):
        monkeypatch.setattr(edits, name, values)
    found = edits.study(pipe, 2)
    assert all(kind in edits.table(found) for kind in edits.KINDS)
    assert "colour, thresholds: 0.5: " in edits.curves(found)
    edits.plot(found, tmp_path / "edits.png")
    assert (tmp_path / "edits.png").stat().st_size > 10_000


@pytest.mark.full
@pytest.mark.long  # four optimisations
def test_chains(pipe: object) -> None:
    errors = inversion.study(pipe, 1, (4,))["rows"]
    assert errors["exact EDICT"]["4"]["all"] < 1e-6 < errors["float16 EDICT"]["4"]["all"]
    for goal, ways in optimisation.study(pipe, 2, 3, ())["goals"].items():
        for way in ("DOODL", "SGOOL"):
            assert ways[way]["loss"][1]["mean"] < ways[way]["loss"][0]["mean"], (goal, way)
        gap = ways["SGOOL"]["loss"][1]["mean"] - ways["DOODL"]["loss"][1]["mean"]
        assert ways["SGOOL - DOODL"]["mean"] == pytest.approx(gap, abs=1e-5)


def test_gradients_of_all_three_ways_agree(pipe: object) -> None:
    """DDIM has one gradient with checkpoints and without, EDICT that of differences."""
    costs = optimisation._costs(pipe, 3)
    assert all(way["seconds"] > 0 for way in costs.values())
    noise, gradients = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(0)), {}
    for name, chain in optimisation.chains_of(pipe, 3).items():
        x = noise.clone().requires_grad_()
        chain(x).square().sum().backward()
        gradients[name] = x.grad
    kept = gradients["DDIM, everything kept"]
    torch.testing.assert_close(gradients["DDIM, a checkpoint a step"], kept, atol=1e-4, rtol=1e-3)
    edict, way = optimisation.chains_of(pipe, 3)["exact EDICT"], gradients["exact EDICT"]
    step = 0.02 * way / way.norm()
    with torch.no_grad():
        ahead, behind = (
            edict(noise + sign * step).double().square().sum().item() for sign in (1, -1)
        )
    assert (ahead - behind) / 0.04 == pytest.approx(way.norm().item(), rel=0.02)


def test_goals_of_optimisation() -> None:
    """Losses of drawn scenes are what they say, and goals are reached by the right scenes alone."""
    drawn = [scenes.Scene((scenes.Thing(name, "circle", 12, 20, 6),)) for name in ("red", "orange")]
    right = scenes.render(drawn)
    wrong = right.flip(0)
    colour = goals.colour_goal(2)
    assert colour.loss(right * 2 - 1).max() < 0.01 < 0.1 < colour.loss(wrong * 2 - 1).min()
    assert colour.reached(right).all()
    assert not colour.reached(wrong).any()
    away = goals.place_loss([[20.0, 12.0], [16.0, 9.0]])(right * 2 - 1)
    assert away.tolist() == pytest.approx([0.0, 5.0], abs=0.01)
    place = goals.place_goal(2)
    near = [torch.roll(right, (y, x), (2, 3)) for y in range(-12, 4, 2) for x in range(-4, 12, 2)]
    assert torch.stack([place.reached(images) for images in near]).any(0).all()
    assert not torch.stack([place.reached(images.flip(1)) for images in near]).any()


@pytest.mark.full
def test_parts_of_an_evaluation_add_up(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in ("gate", "inversion"):
        assert (
            evaluate.main(["--quick", "--only", part, "--json", str(tmp_path / "found.json")]) == 0
        )
    results = json.loads((tmp_path / "found.json").read_text())
    assert results.keys() == {"gate", "inversion", "header"}
    assert all(results[part]["run"]["quick"] for part in ("gate", "inversion"))
    assert "| error of 1 scenes, steps | 4 |" in capsys.readouterr().out


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    """Not a number of them is typed by hand."""
    root = Path(__file__).resolve().parents[2]
    results = json.loads((root / "benchmarks/results/tiny-scenes.json").read_text())
    page = (root / "docs/does_it_work.md").read_text("utf-8")
    shown = {
        "layouts": layouts.table,
        "similar": layouts.table,
        "edits": edits.table,
        "inversion": inversion.table,
        "optimisation": optimisation.table,
    }
    shown |= {name: part.table for name, part in evaluate.EDITING.items() if name in results}
    for part, shown_as in shown.items():
        for text in shown_as(results[part]).split("\n\n"):
            assert text in page, f"{part}:\n{text}"
    gate = results["gate"]
    for name in ("both present", "shape right", "both present in their shapes"):
        assert f"{gate[name]:.1%}" in page
