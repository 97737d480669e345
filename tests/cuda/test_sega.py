"""CUDA's kernels of semantic guidance as nvcc compiles them, emulated in processes of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
CORE = (
    "test_interpolation and cuda-40-0.3",
    "test_percentile_mask and cuda-denormal-torch.bfloat16",
    "test_long_rows and ties-torch.float16",
    "test_sega_guidance and cuda-warming-torch.float32",
    "test_sega_guidance and cuda-summed-torch.float16",
    "test_sega_guidance_in_launches and three-launches-torch.float64",
    "test_sega_guidance_in_launches and long-sums-torch.float16",
)

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")


def emulate(file: str, *options: str) -> str:
    """The output of a run of a file, which must pass."""
    command = [*(sys.executable, "-m", "pytest", "-q", "-rP"), *("-p", "cuda.plugin")]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", *options, file]
    done = subprocess.run(
        command,
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": str(TESTS / "support"), "CUDA_HEAD_DIMS": "40"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


def test_core() -> None:
    selection = " or ".join(f"({part})" for part in CORE)
    said = emulate("backends/gpu_sega.py", "-k", selection, "--cuda-order", "each")
    assert f"{len(CORE)} passed" in said


@pytest.mark.full
@pytest.mark.long
@pytest.mark.parametrize("file", ["backends/gpu_sega.py", "sega"])
def test_every_case(file: str) -> None:
    emulate(file, "-k", "cuda", "--cuda-order", "random")


@pytest.mark.full
def test_a_barrier_that_is_gone_is_found() -> None:
    print(emulate("cuda/sega_mutants.py"))
