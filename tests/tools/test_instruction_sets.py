"""The kernels for every instruction set of this processor, and the refusal of all others."""

from __future__ import annotations

import os
import subprocess

import forked
import pytest
import selection
import torch
from cases import why_skip
from tree import ROOT

ISAS = (
    "amx_bf16",
    "avx512_bf16",
    "avx512",
    "avx2",
    "portable",
)  # the first that a processor has is taken
# `make test` takes a processor's own, and the one that is least like it.
EACH = [pytest.param(isa, marks=[pytest.mark.full] * isa.startswith("avx")) for isa in ISAS]
ASKED = "DENSE_ATTN_ISA"  # read when the library is loaded, so by processes of their own
CORE = [path for path in (ROOT / "tests").rglob("test_*.py") if "mark.core" in path.read_text()]
CALL = """import torch, dense_attn
x, words = torch.ones(1, 1, 2, 3), torch.ones(2, dtype=torch.int32)
dense_attn.layout_attention(x, x, x, words, words, backend="cpu")"""
pytestmark = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))


def run(isa: str, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return forked.run(program, *arguments, **{ASKED: isa})


@pytest.mark.core
def test_the_instruction_set_is_the_one_asked_for() -> None:
    asked = os.environ.get(ASKED) or torch.ops.dense_attn.cpu_isa()
    assert torch.ops.dense_attn.cpu_isa() == asked


@pytest.mark.parametrize("cells", selection.PARTS)
@pytest.mark.parametrize("isa", EACH)
def test_every_instruction_set(isa: str, cells: str) -> None:
    """The core cases of all files again, on those that this processor has and does not take."""
    mine = torch.ops.dense_attn.cpu_isa()
    if ISAS.index(isa) < ISAS.index(mine):
        refusal = f"{ASKED} must name an instruction set that this processor has, got {isa}"
        assert refusal in run(isa, CALL).stderr
    elif isa != mine:
        selected = ("-m", f"core and {cells}", *map(str, CORE))
        done = run(isa, forked.PYTEST, "-q", "-p", "no:cacheprovider", *selected)
        assert done.returncode == 0, done.stdout[-4000:]
        assert " passed" in done.stdout


def test_core_cases_are_found() -> None:
    """Files of attention and of the reversible steps, beside this one."""
    assert {path.parent.name for path in CORE} >= {"backends", "reversible"}
    assert len(CORE) >= 3


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2,"])
def test_an_unknown_instruction_set_is_refused(isa: str) -> None:
    done = run(isa, CALL)
    assert done.returncode == 1
    assert f"{ASKED} must be one of {', '.join(ISAS)}, got {isa}" in done.stderr
