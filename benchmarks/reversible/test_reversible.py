"""Reversible DDIM: its step kernels, a whole chain, the gradient through it, a round trip."""

from __future__ import annotations

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture

from ..harness.measure import Entry, report
from . import chain, gradient, round_trip, steps

Record = Callable[[str, object], None]


def test_steps(entry: Entry, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(entry, steps.measure(entry, benchmark), record_property, benchmark)


def test_chain(entry: Entry, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(entry, chain.measure(entry, benchmark), record_property, benchmark)


def test_gradient(entry: Entry, benchmark: BenchmarkFixture, record_property: Record) -> None:
    report(entry, gradient.measure(entry, benchmark), record_property, benchmark)


def test_round_trip(entry: Entry, record_property: Record) -> None:
    report(entry, round_trip.measure(entry), record_property)
