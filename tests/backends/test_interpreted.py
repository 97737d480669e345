"""The Triton kernels in processes that interpret all of them: Triton interprets all or none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PARTS = {
    "attention": ("test_backends.py", "triton_attention.py", "triton_lists.py", "-k", "triton"),
    "guidance and steps": ("gpu_sega.py", "gpu_steps.py"),
    "public ops": ("triton_backend.py", "test_gpu.py", "test_out_of_memory.py"),
}


@pytest.mark.parametrize(
    ("part", "cells"),
    [
        *((part, "not full") for part in PARTS),
        pytest.param("attention", "full", marks=pytest.mark.full),
        pytest.param("guidance and steps", "full", marks=pytest.mark.full),
    ],
)
def test_interpreted(part: str, cells: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "-m", cells]
    done = subprocess.run(
        [*command, *PARTS[part]],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
