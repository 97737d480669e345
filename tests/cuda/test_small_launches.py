"""The CUDA library's part of the program for sanitizers, emulated in a process of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("triton")  # the program imports it

from cuda.processes import COMPILED, run

ROOT = Path(__file__).resolve().parents[2]
pytestmark = COMPILED
PROGRAM = """
from cuda.compiled import compiled_backend
runtime = compiled_backend()
from cuda.launch import emulated
from dense_attn.benchmarks.host_cost import launches
with emulated(runtime) as runs:
    for part in launches.BY_CUDA:
        part()
print(*{run.kernel for run in runs})
"""


@pytest.mark.full
def test_every_kernel_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    said = run(PROGRAM, head_dims="160")  # narrower heads are of this class, too
    sources = [x.read_text("utf-8") for x in (ROOT / "csrc" / "cuda").rglob("*.cu*")]
    kernels = re.findall(r"__global__ void[^;{]*?\b(\w+_kernel)\(", "".join(sources))
    assert len(kernels) == 15
    for kernel in kernels:
        assert f"{len(kernel)}{kernel}" in said, kernel
