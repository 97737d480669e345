"""A pytest-benchmark that takes no time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace


class Stopwatch:
    """A stand-in for pytest-benchmark that runs what it is given, and says a time it is told."""

    def __init__(self, seconds: float = 1.0) -> None:
        self.seconds = seconds
        self.stats: SimpleNamespace | None = None

    def pedantic(
        self, target: Callable[[], object], setup: Callable[[], None], rounds: int
    ) -> None:
        for _ in range(rounds):
            setup()
            target()
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[self.seconds] * rounds))
