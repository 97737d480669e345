"""A call's cost to the host around the raw ops that it runs, on the smallest tensors.

`of_op` is the time of a call over that of its raw ops, the very calls that it makes, and `of_sdpa`
that over plain attention, or over diffusers' own processor of the same layer: medians over rounds
in which they take turns, on one thread. An exact chain is timed as a whole, its network answering
at once, and told by its steps. Triton's rows are those of `stubbed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..harness.measure import OURS, Entry, Failure, Row, Setting, attempted, spread, wanted
from . import layer, public, stubbed
from .recorded import Call, in_turn, listed, one_thread, raw_calls

OP, SDPA, LAYER = "dense_attn-op", "sdpa", "diffusers"
_RATIOS = {OP: "of_op", SDPA: "of_sdpa", LAYER: "of_sdpa"}  # of a call to each of these
_STRENGTH, _TINY = 0.5, 1e-30  # the second leaves attention as it is
_ROUNDING = 1e-4  # between two ways to compute plain attention


@dataclass(frozen=True)
class Ways:
    """The calls that are compared, and how far their results are from what they must be."""

    calls: dict[str, Call]  # by contender
    errors: dict[str, tuple[float, float]]  # (error, allowed) of each but the library's own


@dataclass(frozen=True)
class Workload:
    """A public op, the contenders of its rows, and what prepares their calls; none of Triton's."""

    op: str
    contenders: tuple[str, ...]
    ways: Callable[[], AbstractContextManager[Ways]] | None = None
    passes: str = "fwd"
    dtype: str = "float32"
    grad: bool = False  # whether the inputs ask for a gradient
    units: int = 1  # steps of a call, of each of which the time is told
    note: str = ""


@contextmanager
def _attention(**options: bool) -> Iterator[Ways]:
    at, plain = public.attention(**options)
    ours = at(_STRENGTH)
    raw, error = _raw_of(ours)
    apart = _apart(listed(at(0.0)()), listed(plain()))
    yield Ways({OURS: ours, OP: raw, SDPA: plain}, {OP: error, SDPA: (apart, _ROUNDING)})


@contextmanager
def _around(make: Callable[[], Call]) -> Iterator[Ways]:
    ours = make()
    raw, error = _raw_of(ours)
    yield Ways({OURS: ours, OP: raw}, {OP: error})


@contextmanager
def _layer(guided: bool) -> Iterator[Ways]:
    with layer.ready(guided, _TINY) as (ours, plain):
        apart = _apart([ours()], [plain()])
    with layer.ready(guided, _STRENGTH) as (ours, plain):
        yield Ways({OURS: ours, LAYER: plain}, {LAYER: (apart, _ROUNDING)})


def _raw_of(ours: Call) -> tuple[Call, tuple[float, float]]:
    """A call's raw ops, and how far the last one's results are from the call's own."""
    found, results = raw_calls(ours)
    *before, last = [raw.call for raw in found]

    def run() -> Any:
        for call in before:
            call()
        return last()

    return (run if before else last), (_apart(listed(run()), results), 1e-12)


def _apart(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of results, each over its largest element: latents are a grid's
    integers but for a scale.
    """
    pairs = [[x.detach().double().flatten() for x in pair] for pair in zip(got, expected)]
    return max(float((a / a.abs().max() - b / b.abs().max()).abs().max()) for a, b in pairs)


_COMPARED, _BOTH = (OURS, OP, SDPA), (OURS, OP)
WORKLOADS = {
    "host-attention": Workload("layout_attention", _COMPARED, _attention),
    "host-attention-record": Workload(
        "layout_attention",
        _COMPARED,
        partial(_attention, requires_grad=True),
        grad=True,
        note="the forward call alone, recorded for gradients",
    ),
    "host-attention-grad": Workload(
        "layout_attention", _COMPARED, partial(_attention, backward=True), "fwd+bwd", grad=True
    ),
    "host-percentile": Workload("percentile_mask", _BOTH, partial(_around, public.percentile_mask)),
    "host-ddim-step": Workload("ddim_step", _BOTH, partial(_around, public.ddim_step)),
    "host-sega-step": Workload("sega_guidance", _BOTH, partial(_around, public.sega_step)),
    "host-exact-step": Workload(
        "ReversibleSampler", _BOTH, partial(_around, public.exact_chain), units=public.STEPS
    ),
    "host-layer": Workload("layout_attention", (OURS, LAYER), partial(_layer, guided=False)),
    "host-layer-guided": Workload(
        "layout_attention",
        (OURS, LAYER),
        partial(_layer, guided=True),
        note="half of the rows are diffusers' own",
    ),
    **{
        x: Workload(
            stubbed.public_op(x), stubbed.contenders(x), dtype=stubbed.DTYPES.get(x, "float32")
        )
        for x in stubbed.OPS
    },
}
PYTHON_ALONE = "the reference is made of torch's own operators: there is no raw op"


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names; quick ones need no other process."""
    rows = (
        Entry(Setting(name, work.passes, work.dtype), contender)
        for name, work in WORKLOADS.items()
        for contender in work.contenders
    )
    return wanted(rows, quick, names, lambda entry: entry.setting.workload not in stubbed.OPS)


def why_not(entry: Entry) -> str | None:
    """The reason why a row is not measured, or None."""
    work = WORKLOADS[entry.setting.workload]
    if LAYER in work.contenders:
        absent = [name for name in ("diffusers", "transformers") if find_spec(name) is None]
        return f"{' and '.join(absent)} not installed" if absent else None
    backend = Entry(entry.setting, OURS).describe("host_cost", [], work.op)["backend"]
    return PYTHON_ALONE if work.ways is not None and backend == "reference" else None


def measure(entry: Entry) -> Row:
    """The row of an entry: host seconds of a call, over those of raw ops and plain attention."""
    work = WORKLOADS[entry.setting.workload]
    row = entry.describe("host_cost", [], work.op) | {"peak_extra_bytes": None}
    row |= {"note": work.note} if work.note else {}
    reason = why_not(entry)
    if reason is not None:
        return row | {"reason": reason}
    with one_thread(), torch.set_grad_enabled(work.grad):
        found = attempted(lambda: _numbers(entry))
    return row | (found.told(entry.ours) if isinstance(found, Failure) else found)


def _numbers(entry: Entry) -> Row:
    """Seconds of a contender's call and its ratios, unless its results are wrong."""
    work = WORKLOADS[entry.setting.workload]
    if work.ways is None:
        return stubbed.row(entry.setting.workload, entry.contender)
    with work.ways() as ways:
        error, allowed = ways.errors.get(entry.contender, (0.0, 0.0))
        row = {"error": error, "allowed": allowed}
        if not error <= allowed:
            reason = f"error {error:.2g} where {allowed:.2g} is allowed"
            return row | {"reason": reason, "wrong": True}
        others = [other for other in ways.calls if other in _RATIOS and other != entry.contender]
        mine, *beside = in_turn(*(ways.calls[name] for name in (entry.contender, *others)))
    row |= spread("seconds", [seconds / work.units for seconds in mine]) | {"rounds": len(mine)}
    for other, theirs in zip(others, beside):
        row |= spread(_RATIOS[other], [a / b for a, b in zip(mine, theirs)])
    return row
