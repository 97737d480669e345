"""Reversible DDIM: its step kernels, a whole chain, the gradient through it, and the error of a
round trip.
"""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import Case, report
from . import chain, gradient, round_trip, steps

Record = Callable[[str, object], None]


def test_steps(case: Case, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(case, steps.measure(case, benchmark), record_property, benchmark)


def test_chain(case: Case, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(case, chain.measure(case, benchmark), record_property, benchmark)


def test_gradient(case: Case, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(case, gradient.measure(case, benchmark), record_property, benchmark)


def test_round_trip(case: Case, record_property: Record) -> None:
    report(case, round_trip.measure(case), record_property)
