"""CUDA's kernels of semantic guidance as nvcc compiles them, emulated in processes of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")  # the tables of cases import it

from cuda.processes import COMPILED, emulate

pytestmark = COMPILED
CORE = (
    "test_interpolation and cuda-40-0.3",
    "test_percentile_mask and cuda-denormal-torch.bfloat16",
    "test_long_rows and ties-torch.float16",
    "test_sega_guidance and cuda-warming-torch.float32",
    "test_sega_guidance and cuda-summed-torch.float16",
    "test_sega_guidance_in_launches and three-launches-torch.float64",
    "test_sega_guidance_in_launches and long-sums-torch.float16",
)


def test_core() -> None:
    selection = " or ".join(f"({part})" for part in CORE)
    said = emulate("backends/gpu_sega.py", selection, "--cuda-order", "each")
    assert f"{len(CORE)} passed" in said


@pytest.mark.full
@pytest.mark.long
@pytest.mark.parametrize("file", ["backends/gpu_sega.py", "sega"])
def test_every_case(file: str) -> None:
    emulate(file, "cuda", "--cuda-order", "random")


@pytest.mark.full
def test_a_barrier_that_is_gone_is_found() -> None:
    print(emulate("cuda/sega_mutants.py", ""))
