"""What a call costs the host on a GPU: many calls enqueued and none waited for, from the public op
to a bare launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import dense_attn
from dense_attn._backends import triton
from dense_attn.reversible import links

from ..harness import machine
from ..harness.clocks import Rounds
from ..harness.measure import OURS, Case, Failure, Latest, Row, Setting, attempted, spread, wanted
from ..layout_attention.workloads import WORKLOADS as ATTENTION
from ..layout_attention.workloads import make_inputs

_CALLS, _ROUNDS = 100, 21  # calls a round: fewer than a GPU's queue holds
_ATTENTION = {
    "launch-self": "sd15-self-16",
    "launch-cross": "sd15-cross-8",
}  # so small that the GPU keeps up
_LEVEL, _ALPHA_BARS, _SHAPE = 0.9, (0.5, 0.6), (4, 4096)
WORKLOADS = {**_ATTENTION, "launch-percentile": "percentile_mask", "launch-ddim-step": "ddim_step"}
_OP, _LAUNCHER = "dense_attn-op", "dense_attn-launcher"
_SAME, _EMPTY = "triton-same-kernel", "triton-empty"
CONTENDERS = (OURS, _OP, _LAUNCHER, _SAME, _EMPTY)
Call = Callable[[], Any]


def cases(quick: bool = False, names: list[str] | None = None) -> Iterator[Case]:
    """All rows of the workloads named, of all without names."""
    dtypes = {name: "float16" if name in _ATTENTION else "float32" for name in WORKLOADS}
    rows = (
        Case(Setting(name, "fwd", dtype), contender)
        for name, dtype in dtypes.items()
        for contender in CONTENDERS
    )
    return wanted(
        rows, (lambda case: case.setting.workload != "launch-self") if quick else None, names
    )


@dataclass(frozen=True)
class Ways:
    """One op's ways to the same kernel, and the module whose kernels it launches."""

    public: Call
    op: Call
    launcher: Call
    launchers: ModuleType


@Latest
def _ways(workload: str) -> Ways:
    if workload in _ATTENTION:
        return _attention_ways(_ATTENTION[workload])
    device = machine.current().device
    x, eps = (
        torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0)).to(device) for _ in range(2)
    )
    if WORKLOADS[workload] == "percentile_mask":
        return Ways(
            lambda: dense_attn.percentile_mask(x, _LEVEL, dim=-1),
            lambda: triton.percentile_mask(x, _LEVEL),
            lambda: triton.sega.percentile_mask(x, _LEVEL),
            triton.sega,
        )
    numbers = x, eps, None, *links.ddim(*_ALPHA_BARS), 1.0
    return Ways(
        lambda: dense_attn.ddim_step(x, eps, *_ALPHA_BARS),
        lambda: triton.ddim_step(*numbers),
        lambda: triton.reversible.ddim_step(*numbers),
        triton.reversible,
    )


def _attention_ways(workload: str) -> Ways:
    inputs = make_inputs(ATTENTION[workload], torch.float16)
    q, k, v, words = inputs.q, inputs.k, inputs.v, (inputs.q_regions, inputs.k_regions)
    lists = dense_attn.tile_lists(q, k, *words)
    strength = inputs.strength.expand(q.shape[:3])
    raw = q, k, v, *words, strength, "range", q.shape[3] ** -0.5, None, None
    kept = triton.layout_attention.TileLists(*lists) if lists else None
    return Ways(
        lambda: dense_attn.layout_attention(q, k, v, *words, strength, tile_lists=lists),
        lambda: triton.layout_attention_fwd(*raw, *(lists or (None,) * 3))[0],
        lambda: triton.layout_attention.layout_attention_fwd(*raw, kept)[0],
        triton.layout_attention,
    )


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
    """What is timed, and the results that it leaves, of which a check is made; none of a kernel
    that does nothing.
    """
    if contender == _EMPTY:
        from .empty_kernel import empty_kernel

        x = torch.empty(1, device=machine.current().device)
        launch = empty_kernel[(1,)]
        return lambda: launch(x, 1, BLOCK=1), []
    if contender != _SAME:
        call = {OURS: ways.public, _OP: ways.op, _LAUNCHER: ways.launcher}[contender]
        return call, _listed(call())
    with _recording(ways.launchers) as launches:
        results = _listed(ways.launcher())
    if not launches:
        raise NotImplementedError("the launcher calls no kernel that can be seen")
    for x in results:
        x.fill_(math.nan)

    def again() -> None:
        for launch in launches:
            launch()

    again()
    return again, results


def _listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def measure(case: Case, benchmark: Any) -> Row:
    """The row of a case: host seconds a call, beside those of the public op; nothing is timed that
    gives other bits.
    """
    op = (
        "layout_attention"
        if case.setting.workload in _ATTENTION
        else WORKLOADS[case.setting.workload]
    )
    row = case.describe("launch", [], op)
    with torch.no_grad():
        found = attempted(lambda: _compared(case))
    if isinstance(found, Failure):
        return row | found.told(case.ours)
    error, rounds = found
    row |= {"error": error, "allowed": 0.0}
    if rounds is None:
        return row | {
            "reason": f"its results are {error:.2g} off those of the public op",
            "wrong": True,
        }
    row |= spread("seconds", rounds.times) | {
        "rounds": len(rounds.times),
        "peak_extra_bytes": None,
        "timing": "host",
    }
    return row if case.contender == OURS else row | spread("ratio", rounds.ratios)


def _compared(case: Case) -> tuple[float, Rounds | None]:
    """The largest difference from the public op's results, and the rounds if there is none."""
    ways = _ways(case.setting.workload)
    call, results = call_of(case.contender, ways)
    expected = _listed(ways.public())
    pairs = [
        (got.double(), right.double().view(got.shape)) for got, right in zip(results, expected)
    ]
    error = max(
        (float((got - right).abs().max().nan_to_num(math.inf)) for got, right in pairs), default=0.0
    )
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
