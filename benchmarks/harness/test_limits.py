"""The machine at its best: the rate of a large matrix product, the bandwidth of a large copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from . import machine
from .clocks import clock, timed

_SIDE = {"cpu": 3072, "cuda": 8192}
_COPIED = {"cpu": 2**26, "cuda": 2**28}  # floats, far beyond any cache
_SECONDS = 4.0  # of a product at most
Record = Callable[[str, object], None]


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float16", "bfloat16"])
def test_matmul(dtype: str, benchmark: BenchmarkFixture, record_property: Record) -> None:
    here = machine.current()
    if here.suite == "cpu" and dtype in ("tf32", "float16"):
        pytest.skip("no row of a CPU has it")
    stored = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    side = _side(stored)
    a, b = torch.randn(2, side, side).to(here.device, stored).unbind(0)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    seconds = clock(benchmark).median(lambda: torch.mm(a, b), rounds=5)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    if seconds is not None:
        record_property("limit", (f"matmul_{dtype}_gflop_per_s", 2e-9 * side**3 / seconds))


def _side(dtype: torch.dtype) -> int:
    """Sides of matrices whose product takes seconds at most: bfloat16 is slow on some CPUs."""
    here = machine.current()
    side = _SIDE[here.suite]
    small = torch.randn(side // 8, side // 8).to(here.device, dtype)
    torch.mm(small, small)
    seconds = 8**3 * timed(lambda: torch.mm(small, small))[1]
    while here.suite == "cpu" and seconds > _SECONDS:
        side, seconds = side // 2, seconds / 8
    return side


def test_copy(benchmark: BenchmarkFixture, record_property: Record) -> None:
    here = machine.current()
    source = torch.randn(_COPIED[here.suite], device=here.device)
    target = torch.empty_like(source)
    seconds = clock(benchmark).median(lambda: target.copy_(source), rounds=9)
    if seconds is not None:  # each byte is read once and written once
        record_property("limit", ("copy_gb_per_s", 2e-9 * source.nbytes / seconds))
