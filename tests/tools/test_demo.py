"""The demo: its table and pictures, and one sentence for what a user gets wrong."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from dense_attn import layout_attention
from dense_attn._backends import table
from dense_attn._command import UserError
from dense_attn.demo import picture, step
from dense_attn.demo.scene import load_scene

pytestmark = pytest.mark.usefixtures("one_thread")
Image = pytest.importorskip("PIL.Image")
LABELS = np.zeros((48, 40), np.uint8)
LABELS[4:30, 2:20], LABELS[20:44, 24:38] = 1, 9


@pytest.fixture
def label_map(tmp_path: Path) -> Path:
    Image.fromarray(LABELS).save(tmp_path / "my.png")
    return tmp_path / "my.png"


def test_demo_end_to_end(label_map: Path, run: Callable) -> None:
    pytest.importorskip("matplotlib")
    output = label_map.with_name("picture.png")
    argv = (
        "--layout",
        label_map,
        "--phrases",
        "a cat",
        "two dogs",
        "--grids",
        8,
        16,
        "--output",
        output,
    )
    code, out, _ = run("demo", *argv)
    assert code == 0
    assert '"a photo of a cat, two dogs", 2 of at most 32 regions' in out
    rows = [line for line in out.splitlines() if line.startswith(("self", "cross", "whole step"))]
    assert [row.split("x ")[0].strip() for row in rows] == [
        "self 16",
        "cross 16",
        "self 8",
        "cross 8",
        "whole step",
    ]
    assert all(float(row.split()[-1]) < 1e-4 for row in rows)  # the largest difference
    assert "random" in out
    with Image.open(output) as picture:
        assert picture.size == (1650, 1034)
        assert len(picture.convert("RGB").getcolors(maxcolors=10**6)) > 100


def test_demo_paints_with_words_that_the_small_model_knows(label_map: Path, run: Callable) -> None:
    """Phrases in one argument, with commas; two regions make one prompt."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    argv = ("--layout", label_map, "--phrases", "a red circle, a blue square", "--grids", 8)
    code, out, _ = run("demo", *argv, "--output", label_map.with_name("mine.png"))
    assert code == 0
    assert re.search(r"DenseDiffusion +overlap with the layout: 0\.\d\d", out)
    with Image.open(label_map.with_name("mine-scenes.png")) as picture:
        assert picture.width == 1210
    code, out, _ = run(
        "demo",
        "--layout",
        label_map,
        "--phrases",
        "a red fox",
        "a blue square",
        "--grids",
        8,
        "--output",
        label_map.with_name("fox.png"),
    )
    assert code == 0
    assert "no generated images: the small model knows a, and, on" in out
    assert out.rstrip().endswith("; not fox")
    assert not label_map.with_name("fox-scenes.png").exists()


def test_demo_without_tqdm_prints_lines(
    label_map: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "tqdm", None)
    code, out, _ = run(
        "demo",
        "--layout",
        label_map,
        "--grids",
        8,
        "--output",
        label_map.with_suffix(".svg"),
    )
    assert code == 0
    assert "layer 2 of 2: cross-attention, 8 x 8" in out


def _save(path: Path, pixels: np.ndarray) -> None:
    Image.fromarray(pixels).save(path)


NO_LAYOUT = "{} is not a usable layout: label_map must hold"
DISTINCT = f"{NO_LAYOUT} 1 to 32 distinct labels besides 0, the background, got"
WRONG_FILES = {
    "{} does not exist": lambda path: None,
    "{} is not an image that can be read": lambda path: path.write_text("a cat on a hill"),
    f"{DISTINCT} 0": lambda path: _save(path, 0 * LABELS),
    f"{DISTINCT} 33": lambda path: _save(path, np.arange(34, dtype=np.uint8)[None].repeat(34, 0)),
    f"{NO_LAYOUT} whole numbers, got others in an image of mode F": (
        lambda path: Image.fromarray(LABELS / np.float32(2)).save(path, format="TIFF")
    ),
    "--phrases must name each of the 2 regions of {}, got ['a cat']": (
        lambda path: _save(path, LABELS)
    ),
}


@pytest.mark.parametrize("sentence", WRONG_FILES)
def test_demo_refuses_a_wrong_file_in_one_sentence(
    sentence: str, tmp_path: Path, run: Callable
) -> None:
    path = tmp_path / "my.png"
    WRONG_FILES[sentence](path)
    phrases = ("--phrases", "a cat") if "--phrases" in sentence else ()
    code, out, err = run("demo", "--layout", path, "--output", tmp_path / "out.png", *phrases)
    assert (code, out, err) == (2, "", f"dense_attn demo: {sentence.format(path)}\n")


@pytest.mark.parametrize("module", ["matplotlib", "PIL"])
def test_demo_without_its_extra_says_so(
    module: str, tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run("demo", "--output", tmp_path / "out.png")
    assert code == 2
    assert err.endswith("pip install dense_attn[bench]\n")
    assert err.count("\n") == 1


def test_demo_refuses_an_output_before_the_work(tmp_path: Path, run: Callable) -> None:
    (tmp_path / "there-scenes.png").mkdir()
    for name, reason in (
        ("no/such/folder.png", "in a folder that exists"),
        ("out.txt", "end in one of .png"),
        ("there-scenes.png", "there-scenes.png cannot be written: it is a folder"),
        ("there.png", "there-scenes.png cannot be written: it is a folder"),
    ):
        code, out, err = run("demo", "--output", tmp_path / name)
        assert (code, out) == (2, "")
        assert reason in err
        assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["there-scenes.png"]


def test_demo_with_a_backend_that_cannot_run(tmp_path: Path, run: Callable) -> None:
    code, _, err = run("demo", "--backend", "cuda", "--output", tmp_path / "out.png")
    assert code == 2
    assert table.missing("cuda", "layout_attention") in err


def test_scene_puts_phrases_where_the_prompt_has_them(label_map: Path) -> None:
    scene = load_scene(label_map, ["a cat", "two small dogs"])
    assert scene.prompt == "a photo of a cat, two small dogs"
    assert scene.layout.spans == ((4, 6), (6, 9))  # behind <start> a photo of
    assert load_scene(label_map).phrases == ("region 1", "region 2")


def test_scene_refuses_a_prompt_that_is_too_long(label_map: Path) -> None:
    assert load_scene(label_map, ["a", "b " * 71]).layout.spans[-1] == (5, 76)
    with pytest.raises(UserError, match="must fit into a prompt of 77 tokens, got 78"):
        load_scene(label_map, ["a", "b " * 72])


@pytest.mark.parametrize("kind", ["self", "cross"])
def test_official_attention_is_the_formula(kind: str, label_map: Path) -> None:
    layer = step.Layer(grid=16, head_dim=40, count=1, kind=kind)
    q, k, v = step.make_inputs(layer, seed=1)
    words = step.modulation_of(layer, load_scene(label_map).layout)
    strength = words["strength"]
    assert (strength[0] == 0).all()
    assert strength[1].max() == pytest.approx(step.WEIGHTS[kind] * 0.981**5)
    dense_mask = ((words["q_regions"][:, None] & words["k_regions"]) != 0).float()[None]
    assert 0 < dense_mask.mean() < 1
    official = step.official_attention(q, k, v, dense_mask, strength[1].T)
    expected = layout_attention(q, k, v, **words, backend="reference")
    torch.testing.assert_close(official, expected, rtol=1e-4, atol=1e-5)


def test_layers_are_those_of_stable_diffusion() -> None:
    assert sum(layer.count for layer in step.SD15_LAYERS) == 32
    assert {layer.head_dim * step.NUM_HEADS for layer in step.SD15_LAYERS} == {320, 640, 1280}


def test_deepest_token_is_in_the_middle() -> None:
    mask = torch.zeros(9, 9, dtype=torch.bool)
    mask[1:8, 2:7] = True
    row, column = picture.deepest_token(mask)
    assert (row, column) in ((3, 4), (4, 4), (5, 4))
    assert picture.deepest_token(torch.eye(5, dtype=torch.bool)) == (0, 0)


def test_shares_of_the_picture_add_up(label_map: Path) -> None:
    scene = load_scene(label_map)
    attended = picture.attention(scene, "self")
    torch.testing.assert_close(attended.after.sum(-1), torch.ones(1024))
    rows = scene.layout.query_regions(32, 32) == 2
    before, after = attended.share(rows)
    assert before == pytest.approx(attended.before[rows][:, rows].sum(-1).mean().item())
    assert 0 < before < after < 1
