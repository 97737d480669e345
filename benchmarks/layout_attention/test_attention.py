"""Layout attention beside its baselines, one test a row."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import report
from .attention import measure
from .suite import Case


def test_attention(
    case: Case, benchmark: BenchmarkFixture, record_property: Callable[[str, object], None]
) -> None:
    report(case, measure(case, benchmark), record_property, benchmark)
