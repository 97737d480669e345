"""The Triton kernels in processes that interpret all of them: Triton interprets all or none."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")

LATER = ("lists", "pipelines")  # not in `make test`
PARTS = {
    "attention": ("test_backends.py", "-k", "triton"),
    "lists": ("triton_attention.py", "triton_lists.py"),
    "guidance and steps": ("gpu_sega.py", "gpu_steps.py", "plans/triton_guidance_plans.py"),
    "public ops": (
        *("triton_backend.py", "test_gpu.py", "test_out_of_memory.py"),
        "plans/triton_plans.py",
    ),
    "pipelines": ("../diffusers/hook/test_lists.py", "-k", "not pipelines"),
}


@pytest.mark.parametrize(
    ("part", "cells"),
    [
        *(
            pytest.param(part, "not full", marks=[pytest.mark.full] * (part in LATER))
            for part in PARTS
        ),
        pytest.param("attention", "full", marks=pytest.mark.full),
        pytest.param("lists", "full", marks=pytest.mark.full),
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
