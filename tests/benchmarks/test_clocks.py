"""The clock of a GPU's events beside a stand-in, and what becomes of a contender that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dense_attn.benchmarks.harness import dry_run, machine
from dense_attn.benchmarks.harness.clocks import EventClock, Trial
from dense_attn.benchmarks.harness.measure import measure

pytestmark = pytest.mark.usefixtures("one_thread")


class ScriptedGpu(dry_run.DryGpu):
    """Time passes when a call says so, and everything that the clock does is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.log = 0.0, []

    def call(self, name: str, seconds: float) -> Callable[[], list[Tensor]]:
        """A call that takes so long."""

        def run() -> list[Tensor]:
            self.log.append(name)
            self.now += seconds
            return [torch.ones(1)]

        return run

    def mark(self) -> float:
        return self.now

    def flush(self) -> None:
        self.log.append("flush")
        self.now += 100.0

    def synchronize(self) -> None:
        self.log.append("wait")


def trial(run: Callable[[], object], seconds: float, in_graph: bool = True) -> Trial:
    return Trial(run, seconds, None, 0.0, 1.0, in_graph)


def test_events_stand_around_the_call_alone() -> None:
    gpu = ScriptedGpu()
    slow, fast = trial(gpu.call("slow", 3.0), 3.0), trial(gpu.call("fast", 2.0), 2.0)
    rounds = EventClock(gpu, seconds=15.0, least=1).compare(slow, fast)
    assert (rounds.times, rounds.beside, rounds.ratios) == ([3.0] * 3, [2.0] * 3, [1.5] * 3)
    assert gpu.log == ["flush", "fast", "flush", "slow"] * 3 + ["wait"]
    assert rounds.notes == {"timing": "events", "partner_timing": "events"}
    gpu.log.clear()
    assert EventClock(gpu, seconds=0.0, least=5).compare(slow, None).beside == []
    assert gpu.log.count("slow") == 5
    assert EventClock(gpu).median(slow.run, rounds=3) == 3.0


def test_a_short_call_is_replayed_from_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = ScriptedGpu()

    def capture(run: Callable[[], list[Tensor]]) -> tuple[Callable[[], None], list[Tensor]]:
        return gpu.call("replay", 1e-6), run()

    monkeypatch.setattr(gpu, "capture", capture)
    clock, short = EventClock(gpu, seconds=0.0, least=3), gpu.call("short", 1e-4)
    assert clock.compare(trial(short, 1e-4), None).times == pytest.approx([1e-6] * 3, abs=1e-9)
    assert clock.compare(trial(short, 1e-4), None).notes == {"timing": "graph"}
    assert clock.compare(trial(short, 1e-4, in_graph=False), None).notes == {"timing": "events"}
    assert clock.compare(trial(gpu.call("long", 1e-3), 1e-3), None).notes == {"timing": "events"}
    monkeypatch.setattr(gpu, "capture", lambda run: (gpu.call("replay", 1e-6), [torch.zeros(1)]))
    timing = clock.compare(trial(short, 1e-4), None).notes["timing"]
    assert "its replay gives other results" in timing

    def refused(run: Callable[[], object]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(gpu, "capture", refused)
    rounds = clock.compare(trial(short, 1e-4), None)
    reason = "operation not permitted when stream is capturing"
    assert rounds.notes == {"timing": f"events; not in a graph: {reason}"}
    assert rounds.times == pytest.approx([1e-4] * 3, abs=1e-9)


def test_who_fails_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_current", dry_run.DryGpu())

    def failing() -> Trial:
        raise torch.OutOfMemoryError("CUDA out of memory.\nand more")

    right = trial(lambda: [torch.ones(1)], 1e-2)
    row = measure({"contender": "eager"}, failing, lambda: right, None)
    assert row == {"contender": "eager", "reason": "OutOfMemoryError: CUDA out of memory."}
    row = measure({"contender": "dense_attn"}, failing, lambda: right, None)
    assert row["wrong"]
    assert "in failing" in row["traceback"]
    row = measure({"contender": "eager"}, lambda: right, failing, None)
    assert row["seconds"] > 0
    assert "ratio" not in row
    row = measure({"contender": "eager"}, lambda: replace(right, error=5.0), lambda: right, None)
    assert row["wrong"]
    assert "seconds" not in row
