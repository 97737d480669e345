"""The calls of `verify` launch every CUDA kernel of a class of head dims, and find it right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # the emulator imports it

from cuda import build

from dense_attn.benchmarks.compiled import cuda_table

ROOT = Path(__file__).resolve().parents[2]
CLASS = 40
VERIFY = """
from cuda.compiled import compiled_backend
runtime = compiled_backend()
from cuda.launch import emulated
from dense_attn._backends import cuda
from dense_attn.verify import calls, layout_attention
cuda.HEAD_DIMS = ({head_dim},)
calls._runs_on_a_gpu = lambda backend: True
layout_attention.DTYPES = calls.HALF
given = [one for one in calls.kernel_calls(["cuda"]) if "cuda" in one.only]
with emulated(runtime) as runs:
    verdicts = [*layout_attention.verify(["cuda"], given)]
assert len(verdicts) == 8
assert all(verdict.passed for verdict in verdicts), verdicts
print(*{{run.kernel for run in runs}})
"""


@pytest.mark.full
@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_every_kernel_of_a_class_is_launched() -> None:
    """Each that `info --kernels` lists, as nvcc compiles it, executed by the emulator."""
    table = json.loads((ROOT / "benchmarks" / "results" / "kernels.json").read_text())
    listed = {
        (row["kernel"], *row["arguments"]) for row in table["cuda_rows"] if row["head_dim"] == CLASS
    }
    done = subprocess.run(
        [sys.executable, "-c", VERIFY.format(head_dim=CLASS)],
        env=os.environ
        | {
            "DENSE_ATTN_CUDA_HEAD_DIMS": str(CLASS),
            "PYTHONPATH": str(Path(build.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [cuda_table.named(symbol) for symbol in done.stdout.split()]
    assert {head_dim for _, _, head_dim in found} == {CLASS}
    assert {(kernel, *arguments) for kernel, arguments, _ in found} == listed
    assert len(listed) == 48
