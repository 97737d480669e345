"""The raw ops that a call runs, to be run again without it, and the host's time of calls."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..harness import machine

Call = Callable[[], Any]
_ROUNDS = 31
_ROUND_SECONDS = 2e-3  # of each call, far beyond what reading the clock takes


@dataclass(frozen=True)
class RawCall:
    """One call of a raw op, with the arguments that it had."""

    op: torch._ops.OpOverload
    arguments: tuple[Any, ...]
    named: dict[str, Any]

    @property
    def name(self) -> str:
        """The op's name in the table of backends."""
        return self.op._schema.name.partition("::")[2]

    @property
    def call(self) -> Call:
        """The call again, with nothing of Python's around it."""
        return partial(self.op, *self.arguments, **self.named)


class _Recorder(TorchDispatchMode):
    """Notes the library's raw ops wherever they are called from, and leaves them to torch."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[RawCall] = []

    def __torch_dispatch__(
        self, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if op.namespace.startswith("dense_attn"):
            alone = [x.detach() if isinstance(x, Tensor) else x for x in args]
            self.calls.append(RawCall(op, tuple(alone), dict(named)))
        return op(*args, **named)


def raw_calls(call: Call) -> tuple[list[RawCall], list[Tensor]]:
    """The raw ops of one call, in their order, and what the call returned."""
    with _Recorder() as recorder:
        results = listed(call())
    return recorder.calls, results


def listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    """One result or several, as a list."""
    return [results] if isinstance(results, Tensor) else list(results)


def in_turn(*calls: Call) -> list[list[float]]:
    """Seconds of each call in each round, in which they take turns.

    Seconds are this thread's on a processor, where other work may run beside it; on a GPU, where
    launches are enqueued and not waited for, they pass on the wall.
    """
    here = machine.current()
    if here.dry_run:
        return [[_seconds(call, 1)] for call in calls]
    counts = [max(1, round(_ROUND_SECONDS / _first_seconds(call))) for call in calls]
    rounds = [[_seconds(*pair) for pair in zip(calls, counts)] for _ in range(_ROUNDS)]
    return [list(times) for times in zip(*rounds)]


def _first_seconds(call: Call) -> float:
    """Seconds of a call, roughly, once a first one has made what it makes."""
    call()
    return statistics.median(_seconds(call, 1) for _ in range(5))


def _seconds(call: Call, count: int) -> float:
    """Seconds of one call of several."""
    here = machine.current()
    clock = time.perf_counter if machine.on_gpu() else time.thread_time
    here.synchronize()
    start = clock()
    for _ in range(count):
        call()
    seconds = (clock() - start) / count
    here.synchronize()
    return seconds


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch on one thread meanwhile, as the smallest tensors have it anyway."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
