"""Layout attention beside its baselines, one test a row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .measure import measure
from .suite import Case


def test_attention(case: Case, benchmark: BenchmarkFixture, record_property: Callable[[str, object], None]) -> None:
    benchmark.group = str(case).removesuffix(f"-{case.contender}")
    row = measure(case, benchmark)
    benchmark.extra_info.update(row)
    record_property("row", row)
    if "wrong" in row:
        pytest.fail(row["reason"])
    if "reason" in row:
        pytest.skip(row["reason"])
