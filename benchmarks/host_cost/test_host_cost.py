"""What a call costs the host, around its raw ops, and on a GPU down to a bare launch."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import Case, report
from . import calls, launch

Record = Callable[[str, object], None]


def test_host_cost(case: Case, record_property: Record) -> None:
    report(case, calls.measure(case), record_property)


def test_launch(case: Case, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(case, launch.measure(case, benchmark), record_property, benchmark)
