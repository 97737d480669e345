"""Ways of editing beside one another: Prompt-to-Prompt's maps, and what counts as a success."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from dense_attn.examples import prompt_to_prompt
from dense_attn.examples.prompt_to_prompt import PromptToPrompt, alignment
from dense_attn.examples.tiny_scenes import edits, evaluate, score
from dense_attn.examples.tiny_scenes.editing import grids, negation, unique, ways

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS = ("a red circle", "a small blue circle")


def test_words_that_stay_swap_and_are_new() -> None:
    moved, new = alignment([0, 5, 6, 7, 1, 1], [0, 5, 8, 7, 1, 1])
    assert moved.nonzero().tolist() == [[0, 0], [1, 1], [2, 2], [3, 3], [4, 4], [5, 5]]
    assert not new.any()
    moved, new = alignment([0, 5, 7, 1, 1, 1], [0, 5, 8, 7, 1, 1])
    assert moved.nonzero().tolist() == [[0, 0], [1, 1], [2, 3], [3, 4], [4, 5]]
    assert new.nonzero().tolist() == [[2, 2]]
    moved, _ = alignment([0, 5, 7, 1, 1, 1], [0, 8, 9, 7, 1, 1])  # one word's place for two
    assert moved[1, 1:3].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("keys", [20, 49], ids=["cross", "self"])
def test_the_result_is_that_of_edited_maps(pipe: object, keys: int) -> None:
    """The paper's rule on maps that are written out: words swapped and weighted."""
    block = PromptToPrompt(pipe, [PROMPTS[0]] * 2, [PROMPTS[1], PROMPTS[0]], weights={"circle": -2})
    q, v = torch.randn(2, 8, 3, 49, 16, dtype=torch.float64)
    k, v = torch.randn_like(q)[:, :, :keys], v[:, :, :keys]
    maps = (q @ k.transpose(2, 3) / 4).softmax(3)
    expected = maps @ v
    for b, (target, source) in enumerate(((6, 4), (7, 5))):
        changed = maps[source].clone()
        if keys == 20:
            if target == 6:  # start, a, small, blue, circle, end ... of start, a, red, circle, end
                changed[..., 2] = maps[source, ..., 2] / 2
                changed[..., 3] = maps[source, ..., 2] / 2
                changed[..., 4:] = maps[source, ..., 3:19]
            changed[..., 4 - b] *= -2
        expected[target] = changed @ v[target]
    with block:
        found = scaled_dot_product_attention(q, k, v)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
        block.done = 0.8  # the maps of its own again
        plain = scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(plain, maps @ v, atol=1e-12, rtol=0)


def test_new_words_have_maps_of_their_own(pipe: object) -> None:
    block = PromptToPrompt(pipe, ["a circle"], ["a blue circle"], weights={"blue": 3.0})
    q, k, v = (torch.randn(4, 2, n, 16, dtype=torch.float64) for n in (9, 20, 20))
    source, own = ((q[b] @ k[b].transpose(1, 2) / 4).softmax(2) for b in (2, 3))
    edited = torch.cat([source[..., :2], 3 * own[..., 2:3], source[..., 2:19]], -1)
    with block:
        found = scaled_dot_product_attention(q, k, v)[3]
    torch.testing.assert_close(found, edited @ v[3], atol=1e-12, rtol=0)


def test_a_prompt_in_the_place_of_itself(pipe: object) -> None:
    """Its image is the source's, and a factor of 1 changes nothing."""
    prompts, few = [PROMPTS[0]] * 2, {"num_inference_steps": 3}
    with PromptToPrompt(pipe, prompts[:1], prompts[:1], weights={"red": 1.0}):
        images = score.generate(pipe, prompts, [3, 3], **few)
    torch.testing.assert_close(images[1], images[0], atol=1e-4, rtol=0)
    plain = score.generate(pipe, prompts[:1], [3], **few)
    torch.testing.assert_close(images[:1], plain, atol=1e-4, rtol=0)


def test_steps_are_counted_without_a_callback(pipe: object) -> None:
    """Maps are exchanged in the steps that were asked for, and anew after a run that broke off."""
    noise, steps, calls = {"prompts": PROMPTS, "seeds": [3, 3]}, {"num_inference_steps": 3}, []

    def stop(_pipe: object, step: int, *_: object) -> dict:
        if step == 1:
            raise KeyboardInterrupt
        return {}

    with PromptToPrompt(pipe, *[[each] for each in PROMPTS], cross=0.5, own=0.3) as edit:
        exchange = edit._exchange
        edit._exchange = lambda *given, **options: (
            calls.append((edit.done, given[0].shape[2] == given[1].shape[2])),
            exchange(*given, **options),
        )[1]
        images = score.generate(pipe, **noise, **steps)
        assert sorted(set(calls)) == [(0.0, False), (0.0, True), (1 / 3, False)]
        with pytest.raises(KeyboardInterrupt):
            score.generate(pipe, **noise, **steps, callback_on_step_end=stop)
        assert torch.equal(score.generate(pipe, **noise, **steps), images)
    assert not torch.equal(score.generate(pipe, **noise, **steps)[1], images[1])
    assert "encode_prompt" not in vars(pipe)


def test_the_innermost_block_counts(pipe: object) -> None:
    noise, few = {"prompts": PROMPTS, "seeds": [3, 3]}, {"num_inference_steps": 2}
    pair = [[each] for each in PROMPTS]
    with PromptToPrompt(pipe, *pair), PromptToPrompt(pipe, *pair, cross=0, own=0):
        inner = score.generate(pipe, **noise, **few)
    assert torch.equal(inner, score.generate(pipe, **noise, **few))


@pytest.mark.parametrize("shares", [{"cross": 0}, {"own": 0}, {}, {"cross": 0, "largest": 4}])
def test_a_step_without_both_halves_is_refused(pipe: object, shares: dict) -> None:
    edit = PromptToPrompt(pipe, *[["a circle"]] * 2, **shares)
    options = {"num_inference_steps": 2, "seeds": [0, 0]}
    with edit, pytest.raises(ValueError, match="with both halves of guidance, got a step without"):
        score.generate(pipe, ["a circle"] * 2, guidance_scale=1.0, **options)
    with edit:  # no layer that is small enough is none that is missing
        score.generate(pipe, ["a circle"] * 2, **options)


A, B = (["a circle"], ["a blue circle"])
NAN = float("nan")


@pytest.mark.parametrize(
    ("sources", "targets", "options", "sentence"),
    [
        (A, A * 2, {}, "targets must be as many as sources, got 2 and 1"),
        (A[0], B, {}, "sources must be a list of one prompt or more, got 'a circle'"),
        (A, B[0], {}, "targets must be a list of one prompt or more, got 'a blue circle'"),
        ([], [], {}, r"sources must be a list of one prompt or more, got \[\]"),
        (A, [3], {}, r"targets must be a list of one prompt or more, got \[3\]"),
        (A, B, {"cross": NAN}, "cross must be finite, got nan"),
        (A, B, {"cross": 5}, "cross must be from 0 to 1, got 5"),
        (A, B, {"own": -1}, "own must be from 0 to 1, got -1"),
        (A, B, {"largest": None}, "largest must be a number, got NoneType"),
        (A, B, {"weights": {"blue": NAN}}, r"weights\['blue'\] must be finite in float32, got nan"),
        (A, B, {"weights": {"blue": "3"}}, r"weights\['blue'\] must be a number, got str"),
        (A, B, {"weights": {"": 3.0}}, "weights must be of words of the targets, got ''"),
        (A, B, {"weights": {3: 3.0}}, "weights must be of words of the targets, got 3"),
        (A, A, {"weights": {"green": 2.0}}, "weights must be of words of the targets, got 'green'"),
        (A, B, {"weights": ["blue"]}, "weights must be factors by words, got list"),
    ],
)
def test_what_prompt_to_prompt_refuses(
    pipe: object, sources: object, targets: object, options: dict, sentence: str
) -> None:
    with pytest.raises((ValueError, TypeError), match=f"^{sentence}$"):
        PromptToPrompt(pipe, sources, targets, **options)


def test_what_prompt_to_prompt_refuses_of_a_pipeline(pipe: object) -> None:
    with pytest.raises(ValueError, match="pipe must have a U-Net, got int"):
        PromptToPrompt(3, A, B)
    edit, options = PromptToPrompt(pipe, A, B), {"num_inference_steps": 1, "seeds": [0, 0]}
    q, words = torch.randn(4, 2, 9, 16), torch.randn(4, 2, 20, 16)  # as many as of the text
    with edit, pytest.raises(ValueError, match="attn_mask must be None, got a mask"):
        scaled_dot_product_attention(q, q, q, torch.ones(9, 9, dtype=torch.bool))
    with edit, pytest.raises(ValueError, match="no layer of as many image tokens as the text's 20"):
        scaled_dot_product_attention(words, words, words)
    for prompts in (B + A, A * 2, A[0]):
        with edit, pytest.raises(ValueError, match=r"prompt must be \[\*sources, \*targets\], "):
            pipe(prompts, num_inference_steps=1)
    with edit, pytest.raises(ValueError, match="num_images_per_prompt must be 1, got 2"):
        score.generate(pipe, A + B, num_images_per_prompt=2, **(options | {"seeds": [0] * 4}))


def test_the_command_line_of_prompt_to_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["p", "--steps", "2", "--target", "a large red circle", "--weight", "large=3"]
    monkeypatch.setattr("sys.argv", line)
    prompt_to_prompt._command()
    assert (tmp_path / "prompt_to_prompt.png").stat().st_size > 100
    monkeypatch.setattr("sys.argv", [*line, "--weight", "large"])
    with pytest.raises(SystemExit):
        prompt_to_prompt._command()


def painted(**boxes: tuple[int, int, int, int]) -> Tensor:
    """One image with boxes of colours on gray."""
    from dense_attn.examples.tiny_scenes.scenes import BACKGROUNDS, COLOURS

    image = torch.full((1, 3, 32, 32), 0.5)
    for name, (x, y, x_end, y_end) in boxes.items():
        image[0, :, y:y_end, x:x_end] = torch.tensor((COLOURS | BACKGROUNDS)[name])[:, None, None]
    return image


@pytest.mark.parametrize(
    ("kind", "image", "expected"),
    [
        ("colour", painted(blue=(8, 8, 16, 16)), (1, 1, 1)),
        ("colour", painted(blue=(16, 8, 24, 16)), (1, 1 - 64 / 960, 0)),
        ("colour", painted(red=(8, 8, 16, 16)), (0, 1, 0)),
        ("ground", painted(white=(0, 0, 32, 32), red=(8, 8, 16, 16)), (1, 1, 1)),
        ("ground", painted(white=(0, 0, 32, 8), red=(8, 8, 16, 16)), (0, 1, 1)),
        ("presence", painted(red=(8, 8, 16, 16), blue=(20, 20, 28, 28)), (1, 1, 1)),
        ("presence", painted(red=(8, 8, 12, 16), blue=(20, 20, 28, 28)), (1, 1 - 32 / 960, 0.5)),
        ("size", painted(red=(8, 8, 18, 16)), (1, 1, 1)),
        ("size", painted(red=(8, 8, 17, 16)), (0, 1, 1)),
    ],
)
def test_scores_of_painted_edits(kind: str, image: Tensor, expected: tuple[float, ...]) -> None:
    asked, counted = {
        "colour": ("a blue square on gray", "blue"),
        "ground": ("a red square on white", "white"),
        "presence": ("a red square and a blue square on gray", "blue"),
        "size": ("a large red square on gray", "red"),
    }[kind]
    case = edits.OpenPrompt("a red square", "", asked, counted)
    found = ways.scores(image, painted(red=(8, 8, 16, 16)), [case], kind)
    assert [found[metric].item() for metric in ways.METRICS] == pytest.approx(expected)


def test_scores_of_negations() -> None:
    own = [edits.OpenPrompt("a square", "a red thing", "", "red")] * 2
    plain = painted(red=(8, 8, 16, 16)).expand(2, -1, -1, -1)
    images = torch.cat([painted(blue=(8, 8, 16, 12)), painted()])
    found = negation.scores(images, plain, own)
    assert found["success"].tolist() == [1, 0]
    assert found["stays"].tolist() == [0.5, 0]
    assert found["unchanged"].tolist() == [1, 1]


def test_differences_are_of_the_same_prompts() -> None:
    """The error of a difference is that of differences; a score that there is not is left out."""
    found = ways.beside(
        {
            "a": dict.fromkeys(ways.METRICS, torch.tensor([0.0, 1.0, torch.nan])),
            "b": dict.fromkeys(ways.METRICS, torch.tensor([0.5, 1.5, torch.nan])),
        },
        "a",
    )
    assert found["b"]["difference"]["stays"] == {"mean": 0.5, "error": 0.0}
    assert found["b"]["all"]["stays"]["mean"] == 1.0


def test_composable_diffusion_is_its_formula(pipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of one step is that of the estimate with conjunction and negation written out."""
    monkeypatch.setattr(score, "STEPS", 1)
    case = edits.OpenPrompt("a circle", "a blue thing", "", "")
    texts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("", *case[:2])]
    noise = torch.randn(1, 12, 16, 16, generator=torch.Generator().manual_seed(0))
    for scale in (6.0, -6.0):
        image = ways.composed(pipe, [case], scale)
        time = pipe.scheduler.timesteps[0]
        with torch.no_grad():
            u, t, e = pipe.unet(noise.expand(3, -1, -1, -1), time, torch.cat(texts)).sample
        estimate = (u + score.GUIDANCE * (t - u) + scale * (e - u))[None]
        latents = pipe.scheduler.step(estimate, time, noise).prev_sample
        expected = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(image, expected, atol=1e-4, rtol=0)


@pytest.mark.full
def test_studies_of_editing(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run by `evaluate`, they come into one file and out of it as tables."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(score, "STEPS", 4)
    for part, kinds in ((ways, "KINDS"), (grids, "CURVES"), (unique, "CURVES")):
        monkeypatch.setattr(part, kinds, ("colour",))
    few = {name: ways.WAYS[name] for name in list(ways.WAYS)[::4]}
    monkeypatch.setattr(ways, "WAYS", few)
    monkeypatch.setattr(grids, "AXES", {"warm-up": ("scale", (3.0, 6.0), "warmup", (0, 2))})
    given = [word for name in evaluate.EDITING for word in ("--only", name)]
    file = tmp_path / "found.json"
    assert evaluate.main(["--quick", "--json", str(file), *given]) == 0
    results, shown = json.loads(file.read_text()), capsys.readouterr().out
    for name, part in evaluate.EDITING.items():
        assert part.table(results[name]) in shown
    assert (tmp_path / "found-grids.png").stat().st_size > 5_000


def test_vectors_of_a_run_make_the_run_again(pipe: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "STEPS", 3)
    own = edits.open_prompts("ground", 3)[::2]  # of one concept
    again, elsewhere = (unique.transferred(pipe, own, own, shift) for shift in (0, 1))
    images = edits.edited(pipe, own, [[case.concept] for case in own], scale=unique.SCALE)
    torch.testing.assert_close(again, images, atol=1e-4, rtol=0)
    assert (elsewhere - images).abs().amax((1, 2, 3)).min() > 0.1
