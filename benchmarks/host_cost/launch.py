"""A launch's cost to the host of a GPU, from the public op down: enqueued, not waited for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dense_attn
from dense_attn._backends import triton

from ..harness import machine
from ..harness.clocks import Rounds
from ..harness.measure import OURS, Entry, Failure, Latest, Row, Setting, attempted, spread, wanted
from ..layout_attention.workloads import WORKLOADS as ATTENTION
from ..layout_attention.workloads import make_inputs
from .public import randn
from .recorded import Call, listed, raw_calls

_CALLS, _ROUNDS = 100, 21  # calls a round: fewer than a GPU's queue holds
# So small that the GPU keeps up.
_ATTENTION = {"launch-self": "sd15-self-16", "launch-cross": "sd15-cross-8"}
_LEVEL, _ALPHA_BARS, _SHAPE = 0.9, (0.5, 0.6), (4, 4096)
WORKLOADS = {**_ATTENTION, "launch-percentile": "percentile_mask", "launch-ddim-step": "ddim_step"}
_OP, _LAUNCHER = "dense_attn-op", "dense_attn-launcher"
_SAME, _EMPTY = "triton-same-kernel", "triton-empty"
CONTENDERS = (OURS, _OP, _LAUNCHER, _SAME, _EMPTY)


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names."""
    dtypes = {name: "float16" if name in _ATTENTION else "float32" for name in WORKLOADS}
    rows = (
        Entry(Setting(name, "fwd", dtype), contender)
        for name, dtype in dtypes.items()
        for contender in CONTENDERS
    )
    return wanted(rows, quick, names, lambda entry: entry.setting.workload != "launch-self")


@dataclass(frozen=True)
class Ways:
    """One op's ways to the same kernel, and the module whose kernels it launches."""

    public: Call
    op: Call
    launcher: Call
    launchers: ModuleType


@Latest
def _ways(workload: str) -> Ways:
    public, launchers = _public(workload)
    raw = raw_calls(public)[0][-1]
    launcher = partial(getattr(launchers, raw.name), *raw.arguments, **raw.named)
    return Ways(public, raw.call, launcher, launchers)


def _public(workload: str) -> tuple[Call, ModuleType]:
    """A public call, and the module that launches its kernels."""
    if workload in _ATTENTION:
        inputs = make_inputs(ATTENTION[_ATTENTION[workload]], torch.float16)
        q, k, v, words = inputs.q, inputs.k, inputs.v, (inputs.q_regions, inputs.k_regions)
        how = {"backend": "triton"}
        how["tile_lists"] = dense_attn.tile_lists(q, k, *words, **how)
        return (
            lambda: dense_attn.layout_attention(q, k, v, *words, inputs.strength, **how),
            triton.layout_attention,
        )
    x, eps = randn(2, *_SHAPE)
    if WORKLOADS[workload] == "percentile_mask":
        return lambda: dense_attn.percentile_mask(x, _LEVEL, dim=-1), triton.sega
    return lambda: dense_attn.ddim_step(x, eps, *_ALPHA_BARS), triton.reversible


class _Recorder:
    """Stands in for a kernel: launches it and keeps the arguments of the launch."""

    def __init__(self, kernel: Any, launches: list[Call]) -> None:
        self._kernel, self._launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        launch = self._kernel[grid]

        def recorded(*arguments: Any, **named: Any) -> None:
            self._launches.append(lambda: launch(*arguments, **named))
            launch(*arguments, **named)

        return recorded


@contextmanager
def _recording(launchers: ModuleType) -> Iterator[list[Call]]:
    """The launches that a module's launchers make meanwhile."""
    kernels = {name: kernel for name, kernel in vars(launchers).items() if name.endswith("_kernel")}
    launches: list[Call] = []
    try:
        for name, kernel in kernels.items():
            setattr(launchers, name, _Recorder(kernel, launches))
        yield launches
    finally:
        for name, kernel in kernels.items():
            setattr(launchers, name, kernel)


def call_of(contender: str, ways: Ways) -> tuple[Call, list[Tensor]]:
    """The call that is timed, and the results that it leaves to a check; an empty kernel's none."""
    if contender == _EMPTY:
        from .empty_kernel import empty_kernel

        x = torch.empty(1, device=machine.current().device)
        launch = empty_kernel[(1,)]
        return lambda: launch(x, 1, BLOCK=1), []
    if contender != _SAME:
        call = {OURS: ways.public, _OP: ways.op, _LAUNCHER: ways.launcher}[contender]
        return call, listed(call())
    with _recording(ways.launchers) as launches:
        results = listed(ways.launcher())
    if not launches:
        raise NotImplementedError("the launcher calls no kernel that can be seen")
    for x in results:
        x.fill_(math.nan)

    def again() -> None:
        for launch in launches:
            launch()

    again()
    return again, results


def measure(entry: Entry, benchmark: Any) -> Row:
    """The row of an entry: host seconds a call, beside the public op's; only of the same bits."""
    name = entry.setting.workload
    op = "layout_attention" if name in _ATTENTION else WORKLOADS[name]
    row = entry.describe("launch", [], op)
    with torch.no_grad():
        found = attempted(lambda: _compared(entry))
    if isinstance(found, Failure):
        return row | found.told(entry.ours)
    error, rounds = found
    row |= {"error": error, "allowed": 0.0}
    if rounds is None:
        reason = f"its results are {error:.2g} off those of the public op"
        return row | {"reason": reason, "wrong": True}
    row |= spread("seconds", rounds.times) | {"rounds": len(rounds.times)}
    row |= {"peak_extra_bytes": None, "timing": "host"}
    return row if entry.contender == OURS else row | spread("ratio", rounds.ratios)


def _compared(entry: Entry) -> tuple[float, Rounds | None]:
    """The largest difference from the public op's results, and the rounds if there is none."""
    ways = _ways(entry.setting.workload)
    call, results = call_of(entry.contender, ways)
    expected = listed(ways.public())
    differences = [
        got.double() - right.double().view(got.shape) for got, right in zip(results, expected)
    ]
    error = max((float(x.abs().max().nan_to_num(math.inf)) for x in differences), default=0.0)
    if error > 0:
        return error, None
    times, beside = zip(*((_enqueued(call), _enqueued(ways.public)) for _ in range(_ROUNDS)))
    return error, Rounds(list(times), list(beside))


def _enqueued(call: Call) -> float:
    """Host seconds a call of many, before the GPU has done them."""
    here = machine.current()
    here.synchronize()
    start = perf_counter()
    for _ in range(_CALLS):
        call()
    seconds = (perf_counter() - start) / _CALLS
    here.synchronize()
    return seconds
