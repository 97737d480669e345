"""The tables of cases on the CUDA kernels, emulated in processes of their own."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")  # the tables of cases import it

from cuda.processes import COMPILED, emulate

pytestmark = COMPILED
ATTENTION = (  # the row kernel, and that of any number of keys, each with its gradient
    "cross-attention-bfloat16-range",
    "one-query-float16-max",
    "ordered-in-runs-bfloat16-range",
    "strength-full-float16-mask",
)
STEPS = (
    "test_exact_steps and torch.float32-torch.bfloat16",
    "test_float_steps and torch.bfloat16-torch.float32",
)
CORE = {  # files, a selection, and how many tests it holds
    "attention": ("test_backends.py", f"cuda and ({' or '.join(ATTENTION)})", len(ATTENTION)),
    "steps": ("gpu_steps.py", f"cuda and ({' or '.join(f'({x})' for x in STEPS)})", len(STEPS)),
}
TABLES = {
    "attention": ("backends/test_backends.py", "cuda"),
    "steps": ("backends/gpu_steps.py", "cuda"),
    "raw calls of steps": ("reversible/test_raw_calls.py", ""),
}


@pytest.mark.parametrize("order", ["random", pytest.param("backward", marks=pytest.mark.full)])
@pytest.mark.parametrize("part", CORE)
def test_core(part: str, order: str) -> None:
    file, selection, count = CORE[part]
    assert f"{count} passed" in emulate(f"backends/{file}", selection, "--cuda-order", order)


@pytest.mark.full
@pytest.mark.long
@pytest.mark.parametrize("order", ["random", "backward"])
@pytest.mark.parametrize("part", TABLES)
def test_tables(part: str, order: str) -> None:
    emulate(*TABLES[part], "-m", "not full", "--cuda-order", order, head_dims="")
