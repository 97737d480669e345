"""Layout attention's Triton kernels without a GPU: through the interpreter, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

import aot  # noqa: E402

CALLS = [("fwd", 64), ("row_fwd", 64), ("bwd_q", 64), ("bwd_kv", 64)]


def test_through_the_interpreter() -> None:
    """The shared test and what is Triton's own, side by side in processes of their own, where Triton interprets."""
    here = Path(__file__).parent
    shared = [str(here / "test_backends.py"), "-k"]
    own = str(here / "triton_attention.py")
    parts = ([*shared, "test_accuracy and triton and phases"], [own, *shared, "interpreted or triton and not phases"])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-rN", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    processes = [
        subprocess.Popen([*command, *part], env=environment, stdout=subprocess.PIPE, text=True) for part in parts
    ]
    for process in processes:
        output = process.communicate()[0]
        assert process.returncode == 0, output[-4000:]
        assert " passed" in output


@pytest.mark.parametrize(("kind", "head_dim"), CALLS)
@pytest.mark.parametrize("target", ["sm_90"])
def test_compiled_ahead_of_time(target: str, kind: str, head_dim: int) -> None:
    kernel, arguments, options = aot.attention_call(kind, target, head_dim, ordered=kind == "fwd")
    compiled = aot.compile_for(target, kernel, arguments, options)
    assert compiled.spills <= (0 if "fwd" in kind else 16)
    assert compiled.shared <= aot.SHARED_LIMITS[target]
    assert compiled.matrix > 0


def test_spills_are_seen() -> None:
    """The negative control: a tile too large for four warps."""
    config = aot.configs.Config(128, 64, 4, 3)
    kernel, arguments, options = aot.attention_call("fwd", "sm_90", 64, config=config)
    assert aot.compile_for("sm_90", kernel, arguments, options).spills > 0
