"""Every example runs and does what it says."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dense_attn import examples
from dense_attn.examples import (
    compare_with_sdpa,
    inversion_round_trip,
    latent_optimisation,
    layout_to_image,
    layout_to_video,
    optimise_queries,
    prompt_to_prompt,
    regional_prompts,
    semantic_edit,
)
from dense_attn.examples import layout_attention as ten_lines

FOLDER = Path(examples.__file__).parent


def test_layout_attention() -> None:
    self_attended, cross_attended = ten_lines.main(grid=8)
    assert self_attended.shape == cross_attended.shape == (2, 8, 64, 40)
    assert torch.isfinite(self_attended).all()
    assert torch.isfinite(cross_attended).all()


def test_compare_with_sdpa(capsys: pytest.CaptureFixture) -> None:
    assert compare_with_sdpa.main(grid=8) < 1e-5
    assert "with the layout" in capsys.readouterr().out


def test_optimise_queries() -> None:
    losses = optimise_queries.main(grid=8, steps=10)
    assert losses[-1] < 0.8 * losses[0]


def of_noise(images: list, count: int) -> None:
    """Pictures of one size, no two alike."""
    assert len(images) == count
    assert len({image.size for image in images}) == 1
    assert len({image.tobytes() for image in images}) == count


def test_layout_to_image() -> None:
    pytest.importorskip("diffusers")
    of_noise(layout_to_image.main(steps=4), 2)


def test_layout_to_video() -> None:
    pytest.importorskip("diffusers")
    plain, placed = layout_to_video.main(steps=2)
    assert len(plain) == len(placed) == 9
    of_noise([plain[0], placed[0], placed[-1]], 3)


def test_regional_prompts() -> None:
    pytest.importorskip("diffusers")
    of_noise(regional_prompts.main(steps=2), 4)


def test_semantic_edit() -> None:
    pytest.importorskip("diffusers")
    of_noise(semantic_edit.main(steps=5), 2)


def test_prompt_to_prompt() -> None:
    pytest.importorskip("diffusers")
    of_noise(prompt_to_prompt.main(steps=5), 3)


def test_inversion_round_trip() -> None:
    pytest.importorskip("diffusers")
    images, errors = inversion_round_trip.main(steps=10)
    of_noise(images[::2], 2)
    assert errors["exact"] < 1e-7 < errors["floats"] < 1e-1


def test_latent_optimisation(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("diffusers")
    images, losses = latent_optimisation.main(steps=6)
    of_noise(images, 3)
    assert all(each[-1] < each[0] for each in losses)
    assert "SGOOL: loss" in capsys.readouterr().out


def test_the_command_line_of_an_example(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    command = [sys.executable, "-m", "dense_attn.examples.layout_to_image", "--steps", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (
        "no --model, such as stable-diffusion-v1-5/stable-diffusion-v1-5: random weights"
        in done.stdout
    )
    assert (tmp_path / "layout_to_image.png").stat().st_size > 100


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("[!_]*.py")))
def test_every_example_has_a_test(name: str) -> None:
    assert f"test_{name}" in globals()
    assert importlib.import_module(f"dense_attn.examples.{name}").__doc__
