"""How a contender and its partner are timed in turn: by the clock, or by a GPU's events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import machine

Result = TypeVar("Result")


@dataclass(frozen=True)
class Trial:
    """A contender ready to be timed, after its check and a first call."""

    run: Callable[[], object]
    seconds: float
    peak_extra_bytes: int | None
    error: float  # of the result where error/allowed is largest
    allowed: float
    in_graph: bool = True  # whether a GPU may replay it from a graph, where it is short


@dataclass(frozen=True)
class Rounds:
    """Seconds of each round of a contender, and of its partner; notes for the row."""

    times: list[float]
    beside: list[float]
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        """Contender over partner, each round's."""
        return [mine / theirs for mine, theirs in zip(self.times, self.beside)]


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """A result and the seconds until the machine had it."""
    here = machine.current()
    here.synchronize()
    start = time.perf_counter()
    result = call()
    here.synchronize()
    return result, time.perf_counter() - start


class WallClock:
    """A CPU's clock: pytest-benchmark times the contender, before whose rounds the partner runs."""

    _SECONDS = 0.5  # of rounds a row, beyond the three rounds that a median needs
    _SLOW = 8.0  # seconds of a pair of calls from which one round has to do

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark

    def compare(self, contender: Trial, partner: Trial | None) -> Rounds | None:
        """The rounds, or None where timing is switched off."""
        pair = contender.seconds + (partner.seconds if partner else 0)
        rounds = 1 if pair > self._SLOW else max(3, min(100, round(self._SECONDS / pair)))
        beside: list[float] = []

        def setup() -> None:
            if partner:
                beside.append(timed(partner.run)[1])

        self._benchmark.pedantic(contender.run, setup=setup, rounds=rounds)
        stats = self._benchmark.stats
        return None if stats is None else Rounds(stats.stats.data, beside)

    def median(self, call: Callable[[], object], rounds: int) -> float | None:
        """Seconds of a call after a first one, None where timing is switched off."""
        self._benchmark.pedantic(call, rounds=rounds, warmup_rounds=1)
        return None if self._benchmark.stats is None else self._benchmark.stats.stats.median


class EventClock:
    """A GPU's clock: events around each call, its cache emptied; a graph replays a short call.

    The stream is waited for at the end alone, so that the time of launches shows only where it
    exceeds the GPU's.
    """

    _SMALL = 5e-4  # seconds of a call, host and all, below which launches would be timed

    def __init__(
        self, gpu: machine.Gpu, seconds: float = 0.25, least: int = 5, most: int = 200
    ) -> None:
        self._gpu, self._seconds, self._least, self._most = gpu, seconds, least, most

    def compare(self, contender: Trial, partner: Trial | None) -> Rounds:
        """The rounds, and how each side was timed."""
        calls, how = [], []
        for trial in (partner, contender) if partner else (contender,):
            call, way = self._prepared(trial)
            calls.append(call)
            how.append(way)
        pair = contender.seconds + (partner.seconds if partner else 0)
        times = self._rounds(calls, max(self._least, min(self._most, round(self._seconds / pair))))
        notes = {"timing": how[-1]} | ({"partner_timing": how[0]} if partner else {})
        return Rounds(times[-1], times[0] if partner else [], notes)

    def median(self, call: Callable[[], object], rounds: int) -> float:
        """Seconds of a call after a first one."""
        call()
        return statistics.median(self._rounds([call], rounds)[0])

    def _rounds(self, calls: list[Callable[[], object]], rounds: int) -> list[list[float]]:
        """Seconds of each call, which take turns."""
        marks = [[self._marked(call) for call in calls] for _ in range(rounds)]
        self._gpu.synchronize()
        return [[self._gpu.between(*pair[index]) for pair in marks] for index in range(len(calls))]

    def _marked(self, call: Callable[[], object]) -> tuple[machine.Mark, machine.Mark]:
        self._gpu.flush()
        start = self._gpu.mark()
        call()
        return start, self._gpu.mark()

    def _prepared(self, trial: Trial) -> tuple[Callable[[], object], str]:
        """The part of a contender that is timed, the call or a graph of it, and how."""
        if trial.seconds >= self._SMALL or not trial.in_graph:
            return trial.run, "events"
        try:
            with torch.no_grad():
                replay, captured = self._gpu.capture(trial.run)
                replay()
                same = all(map(_same, captured, trial.run()))
        except RuntimeError as error:
            self._gpu.synchronize()
            return trial.run, f"events; not in a graph: {str(error).splitlines()[0]}"
        if not same:
            return trial.run, "events; not in a graph: its replay gives other results"
        return replay, "graph"


def _same(replayed: Tensor, called: Tensor) -> bool:
    return torch.equal(replayed, called)


def clock(benchmark: Any) -> WallClock | EventClock:
    """The clock of this run's machine."""
    here = machine.current()
    if here.suite == "cpu":
        return WallClock(benchmark)
    return EventClock(here, seconds=0, least=1) if here.dry_run else EventClock(here)
