"""What the machine can do at best: rate of a large matrix product, bandwidth of a large copy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

_SIDE = 3072
_COPIED = 2**26  # floats, far beyond any cache
Record = Callable[[str, object], None]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_matmul(dtype: str, benchmark: BenchmarkFixture, record_property: Record) -> None:
    a, b = torch.randn(2, _SIDE, _SIDE).to(getattr(torch, dtype)).unbind(0)
    benchmark.pedantic(torch.mm, (a, b), rounds=5, warmup_rounds=1)
    if benchmark.stats is not None:
        record_property("limit", (f"matmul_{dtype}_gflop_per_s", 2e-9 * _SIDE**3 / benchmark.stats.stats.median))


def test_copy(benchmark: BenchmarkFixture, record_property: Record) -> None:
    source = torch.randn(_COPIED)
    target = torch.empty_like(source)
    benchmark.pedantic(target.copy_, (source,), rounds=9, warmup_rounds=1)
    if benchmark.stats is not None:  # each byte is read once and written once
        record_property("limit", ("copy_gb_per_s", 2e-9 * source.nbytes / benchmark.stats.stats.median))
