"""A call's cost to the host, around its raw ops, and on a GPU down to a bare launch."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import Entry, report
from . import calls, launch

Record = Callable[[str, object], None]


def test_host_cost(entry: Entry, record_property: Record) -> None:
    report(entry, calls.measure(entry), record_property)


def test_launch(entry: Entry, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(entry, launch.measure(entry, benchmark), record_property, benchmark)
