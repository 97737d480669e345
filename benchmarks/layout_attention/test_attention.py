"""Layout attention beside its baselines, one test a row."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import report
from .attention import measure
from .suite import Entry


def test_attention(
    entry: Entry, benchmark: BenchmarkFixture, record_property: Callable[[str, object], None]
) -> None:
    report(entry, measure(entry, benchmark), record_property, benchmark)
