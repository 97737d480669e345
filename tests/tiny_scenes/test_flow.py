"""The small flow model: its prompts, layouts, ways along the flow, training, and its tables."""

from __future__ import annotations

import json
import random
from importlib import resources
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dense_attn.examples.tiny_scenes import scenes, score
from dense_attn.examples.tiny_scenes.model import weights_of
from dense_attn.examples.tiny_scenes.train import RATE
from dense_attn.examples.tiny_scenes_flow import (
    chains,
    evaluate,
    extremes,
    inversion,
    layouts,
    model,
    optimisation,
    sheet,
    train,
)
from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def flow() -> model.OneEncoder:
    """The small trained model."""
    return model.load_pipeline()


def test_weights_are_small() -> None:
    weights = resources.files("dense_attn.examples.tiny_scenes_flow") / model.WEIGHTS
    assert Path(str(weights)).stat().st_size <= 12e6


def test_one_encoder_is_all_there_is(flow: model.OneEncoder) -> None:
    text, _, pooled, _ = flow.encode_prompt("a red circle", None, None)
    assert text.shape == (1, 20, model.TEXT)
    assert pooled.shape == (1, model.TEXT)


def test_untrained_velocities_are_zero() -> None:
    """Zeros are a stable begin, and not what a trained model says."""
    network = chains.Network(model.untrained(), ["a red circle"])
    assert network(torch.randn(1, 12, 16, 16), torch.tensor(500.0)).abs().max() == 0


def test_prompts_and_layouts(flow: model.OneEncoder) -> None:
    """Both things are there, and with a layout where it says."""
    rng = random.Random(43)
    drawn = [scenes.draw_scene(rng, 2, unseen=False) for _ in range(6)]
    plain, ours = (
        score.score(score.laid_out(flow, drawn, range(6), setting, "auto"), drawn)
        for setting in (None, {})
    )
    assert plain["present"].mean() >= 0.6
    assert ours["iou"].mean() > plain["iou"].mean() + 0.1
    assert ours["swapped"].mean() < 0.1


def test_every_setting_of_the_study_is_taken(flow: model.OneEncoder) -> None:
    settings = [options for ways in layouts.tried().values() for options in ways.values()]
    for setting in [*settings, *layouts.OTHERS.values()]:
        if setting and "prompts" not in setting:
            options = layouts.options_of(setting)
            with apply_layout(flow, "a red circle", [("a red circle", (0, 0, 0.5, 1))], **options):
                pass


def test_windows_in_sigma(flow: model.OneEncoder) -> None:
    """Three quarters of a shifted schedule end where half of a plain one does."""
    before = flow.scheduler
    with layouts.shifted(flow, 1.0) as plain, layouts.shifted(flow, 3.0) as more:
        assert plain[10] == pytest.approx(0.5, abs=0.05)
        assert more[15] == pytest.approx(plain[10], abs=0.03)
    assert flow.scheduler is before


def test_euler_is_the_pipeline(flow: model.OneEncoder) -> None:
    """The chains' network is asked as the pipeline asks it, guidance inside."""
    noise = torch.randn(2, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    prompts, steps = ["a red circle", "a blue square on white"], 3
    scheduler = flow.scheduler
    scheduler.set_timesteps(steps)
    ours = chains.euler(chains.Network(flow, prompts, 4.0), noise, scheduler.sigmas.tolist())
    options = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "latent"}
    theirs = flow(prompts, latents=noise, **options).images
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_orders_of_the_ways() -> None:
    """On `v = x` half the step is half of Euler's error, and a quarter of the second order's."""
    start = torch.ones(1, dtype=torch.float64)

    def error(walk: object, steps: int) -> float:
        found = walk(lambda x, t: x, start, chains.sigmas(steps))
        return (found - torch.exp(torch.tensor(-1.0, dtype=torch.float64))).abs().item()

    assert error(chains.euler, 40) / error(chains.euler, 80) == pytest.approx(2, rel=0.05)
    second = error(chains.second_order, 40) / error(chains.second_order, 80)
    assert second == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("name", list(chains.WAYS))
def test_ways_count_their_calls_and_come_back(name: str) -> None:
    way, levels, calls = chains.WAYS[name], chains.sigmas(8), []

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        calls.append(float(t))
        return torch.tanh(x)

    noise = torch.randn(1, 4, 4, 4, dtype=torch.float64)
    ends = way.there(network, (noise, noise.clone()), levels)
    assert len(calls) in (8 * way.calls, 8 * way.calls + 1)  # the leapfrog begins with one more
    back = way.back(network, ends, levels)
    again = way.there(network, back, levels)[0]
    assert torch.equal(again, ends[0]) == name.startswith("exact")


def test_edits_are_counted() -> None:
    """A drawn edit has it all; another colour, another place and another ground lose one each."""
    thing = scenes.Thing("red", "circle", 12, 20, 6)
    scene = scenes.Scene((thing,))

    def found(colour: str, ground: str = "gray", shift: int = 0) -> list[float]:
        there = scenes.Thing(colour, "circle", 12 + shift, 20, 6)
        image = scenes.render([scenes.Scene((there,), ground)])
        rows = inversion.edited(image, scenes.render([scene]), [scene], ["blue"])
        return [row["mean"] for row in rows.values()]

    assert found("blue") == [1.0, pytest.approx(1.0, abs=0.15), pytest.approx(1.0, abs=0.05)]
    assert found("red")[:2] == [0.0, 0.0]
    assert found("blue", "white")[2] < 0.1
    assert found("blue", shift=12)[1] == 0.0


def test_training_begins_with_given_weights(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    weights = str(resources.files("dense_attn.examples.tiny_scenes_flow") / model.WEIGHTS)
    options = ["--output", str(tmp_path), "--steps", "1", "--batch", "2", "--processes", "1"]
    train.main([*options, "--start", weights])
    before, after = (
        weights_of(model.load_pipeline(path), model.PARTS)
        for path in (None, tmp_path / "weights.safetensors")
    )
    moved = {
        name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])
    }
    assert moved == set(model.PARTS)
    assert max((after[name] - value).abs().max() for name, value in before.items()) < 2 * RATE
    assert len(json.loads((tmp_path / "losses.json").read_text())) == 1


@pytest.mark.full
def test_the_sheet(flow: model.OneEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rows = sheet.shipped_rows()[:1]
    monkeypatch.setattr(sheet, "shipped_rows", lambda: rows)
    sheet.draw(flow, tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


@pytest.mark.full
def test_parts_of_an_evaluation_add_up(
    flow: model.OneEncoder, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = str(tmp_path / "found.json")
    for part in ("gate", "round-trips", "inversion", "optimisation"):
        assert evaluate.main(["--quick", "--only", part, "--json", file]) == 0
    results = json.loads((tmp_path / "found.json").read_text())
    assert results.keys() == {"gate", "round-trips", "inversion", "optimisation", "header"}
    assert results["header"]["steps"] == flow.usual["num_inference_steps"]
    assert "| Euler, 4 steps | 4 |" in capsys.readouterr().out


@pytest.mark.full
def test_optimised_noise(flow: model.OneEncoder) -> None:
    for ways in optimisation.study(flow, 2, 3)["goals"].values():
        for way, found in ways.items():
            assert found["loss"][1]["mean"] < found["loss"][0]["mean"], way


def test_the_tables_of_the_docs_are_those_of_the_results() -> None:
    """Not a number of them is typed by hand."""
    root = Path(__file__).resolve().parents[2]
    results = json.loads((root / "benchmarks/results/tiny-scenes-flow.json").read_text())
    page = (root / "docs/does_it_work/flow.md").read_text("utf-8")
    for part, shown_as in evaluate.TABLES.items():
        if part in results:
            for text in shown_as(results[part]).split("\n\n"):
                assert text in page, f"{part}:\n{text}"
    for name in ("both present", "shape right", "both present in their shapes"):
        assert f"{results['gate'][name]:.1%}" in page


def test_extremes_of_the_text_block() -> None:
    """At strength 1 a row's own words have its largest score of the text, all others the least."""
    q, k = torch.randn(2, 1, 2, 70, 8, generator=torch.Generator().manual_seed(0)).unbind()
    v = torch.eye(70).expand(1, 2, 70, 70)  # so that results are weights
    words, text = torch.ones(1, 70, dtype=torch.int32), extremes.IMAGE_TOKENS
    words[:, text + 2 :] = 0
    moved, plain = (
        extremes.attention(q, k, v, words, words, torch.full((1, 2, 70), c), scale=None)
        for c in (1.0, 0.0)
    )
    torch.testing.assert_close(plain, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    own, others = moved[:, :, :text, text : text + 2], moved[:, :, :text, text + 2 :]
    for part in (own, others):
        torch.testing.assert_close(part, part[..., :1].expand_as(part))
    ratio = moved[:, :, :text, :text] / plain[:, :, :text, :text]  # images among themselves
    torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))
    block = plain[:, :, :text, text:]
    torch.testing.assert_close(
        own[..., 0] / others[..., 0], block.amax(-1) / block.amin(-1), rtol=1e-4, atol=0
    )
    assert torch.equal(moved[:, :, text:], plain[:, :, text:])
