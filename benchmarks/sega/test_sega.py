"""Percentiles and semantic guidance beside their baselines, one test a row."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import Entry, report
from . import guidance, percentile

Record = Callable[[str, object], None]


def test_percentile(entry: Entry, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(entry, percentile.measure(entry, benchmark), record_property, benchmark)


def test_sega(entry: Entry, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(entry, guidance.measure(entry, benchmark), record_property, benchmark)
