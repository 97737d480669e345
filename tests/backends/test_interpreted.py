"""The Triton kernels in processes that interpret all of them: Triton interprets all or none."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")

PARTS = {
    "attention": ("test_backends.py", "triton_attention.py", "triton_lists.py", "-k", "triton"),
    "guidance and steps": ("gpu_sega.py", "gpu_steps.py"),
    "public ops": ("triton_backend.py", "test_gpu.py", "test_out_of_memory.py"),
    "pipelines": ("../diffusers/hook/test_lists.py", "-k", "not pipelines"),
}


@pytest.mark.parametrize(
    ("part", "cells"),
    [
        *((part, "not full") for part in PARTS if part != "pipelines"),
        pytest.param("pipelines", "not full", marks=pytest.mark.full),
        pytest.param("attention", "full", marks=pytest.mark.full),
        pytest.param("guidance and steps", "full", marks=pytest.mark.full),
    ],
)
def test_interpreted(part: str, cells: str) -> None:
    options = ("-q", "-rN", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", cells)
    done = forked.run(
        forked.PYTEST, *options, *PARTS[part], cwd=Path(__file__).parent, TRITON_INTERPRET="1"
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
