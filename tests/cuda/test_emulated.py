"""The tables of cases on the CUDA kernels, emulated in processes of their own."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")  # the emulator imports it

from cuda import build

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
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


def emulate(file: str, selection: str, *options: str, head_dims: str = "40") -> str:
    """The output of a run of a file below tests/, which must pass."""
    command = ("-q", "-rN", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "cuda.plugin")
    done = forked.run(
        *(forked.PYTEST, *command, "-k", selection, *options, file),
        cwd=ROOT / "tests",
        CUDA_HEAD_DIMS=head_dims,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("part", CORE)
def test_core(part: str) -> None:
    file, selection, count = CORE[part]
    assert f"{count} passed" in emulate(f"backends/{file}", selection, "--cuda-order", "each")


@pytest.mark.full
@pytest.mark.long
@pytest.mark.parametrize("order", ["random", "backward"])
@pytest.mark.parametrize("part", TABLES)
def test_tables(part: str, order: str) -> None:
    emulate(*TABLES[part], "-m", "not full", "--cuda-order", order, head_dims="")
