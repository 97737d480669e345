"""Every example runs and does what it says."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from dense_attn.examples import compare_with_sdpa, optimise_queries
from dense_attn.examples import layout_attention as ten_lines

from dense_attn import examples

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


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("[!_]*.py")))
def test_every_example_has_a_test(name: str) -> None:
    assert f"test_{name}" in globals()
    assert importlib.import_module(f"dense_attn.examples.{name}").__doc__
