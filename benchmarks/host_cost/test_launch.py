"""What a call costs the host of a GPU, one test a row."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import Case, report
from .launch import measure


def test_launch(
    case: Case, benchmark: BenchmarkFixture, record_property: Callable[[str, object], None]
) -> None:
    report(case, measure(case, benchmark), record_property, benchmark)
