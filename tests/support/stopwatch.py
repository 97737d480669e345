"""A pytest-benchmark that takes no time."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace


class Stopwatch:
    """Stands in for pytest-benchmark: runs setup and target in turn and keeps the times it is
    told.
    """

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
