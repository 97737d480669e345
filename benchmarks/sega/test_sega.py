"""Percentiles and semantic guidance beside their baselines, one test a row."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import Case, report
from . import guidance, percentile

Record = Callable[[str, object], None]


def test_percentile(case: Case, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(case, percentile.measure(case, benchmark), record_property, benchmark)


def test_sega(case: Case, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(case, guidance.measure(case, benchmark), record_property, benchmark)
