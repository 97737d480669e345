"""One row of the suite: is the contender right, what memory does it need, how long does it take beside its partner."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from dense_attn import reference
from dense_attn._memory import peak_extra_bytes
from dense_attn._verify import judge

from .baselines import CONTENDERS, Call
from .suite import Case, Setting, backend, why_not
from .workloads import Inputs, Workload, make_inputs

Result = TypeVar("Result")
_SECONDS = 0.5  # of rounds a row, beyond the three rounds that a median needs
_BASELINE_SLACK = 4  # wrong maths is off by far more
_SLOW = 8.0  # seconds of a pair of calls from which one round has to do
_CHECKED_ROWS = 256  # of the first and the last head, where all are too many
_CHECKED_PAIRS = 2**23  # elements of a score matrix that float64 can afford


@dataclass(frozen=True)
class Trial:
    """A contender ready to be timed, after its check and a first call."""

    run: Callable[[], list[Tensor]]
    seconds: float
    peak_extra_bytes: int | None
    error: float  # of the result where error/allowed is largest
    allowed: float


@lru_cache(maxsize=3)  # a row's contender, its partner and their predecessor
def trial(case: Case) -> Trial:
    """Check a contender against the reference, then take its time and memory roughly."""
    setting, inputs = case.setting, _inputs(case.setting)
    call = CONTENDERS[case.contender](inputs)
    heads, rows = _subset(setting.workload)
    grad_out = torch.zeros_like(inputs.grad_out)
    grad_out[:, :, rows] = inputs.grad_out[:, :, rows]  # so that the checked rows alone make dk and dv
    (peak, got), seconds = _timed(lambda: peak_extra_bytes(lambda: run(call, inputs, grad_out, setting.backward)))
    picked = [_heads(x, heads) for x in got]
    picked[:2] = [x[:, :, rows] for x in picked[:2]]  # out and dq
    error, allowed = _worst(picked, *_expected(setting, case.contender != "sdpa"), setting.dtype)

    size = sum(x.nbytes for x in got)
    del got
    again = lambda: run(call, inputs, inputs.grad_out, setting.backward)  # noqa: E731
    if seconds < 2:  # a first call that short is mostly code loaded and threads started
        (peak, _), seconds = _timed(lambda: peak_extra_bytes(again))
    return Trial(again, seconds, None if peak is None else max(0, peak - size), error, allowed)


def run(call: Call, inputs: Inputs, grad_out: Tensor, backward: bool) -> list[Tensor]:
    """[out], or [out, dq, dk, dv]."""
    if not backward:
        with torch.no_grad():
            return [call(inputs.q, inputs.k, inputs.v)]
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad_out)]


@lru_cache(maxsize=1)
def _inputs(setting: Setting) -> Inputs:
    return make_inputs(setting.workload, setting.dtype)


def _subset(workload: Workload) -> tuple[list[int], Tensor]:
    """The (batch, head) pairs and the query rows whose results are checked: all, or what float64 can afford."""
    rows, total = workload.seqlen_q, workload.batch * workload.num_heads
    if workload.pairs <= _CHECKED_PAIRS:
        return list(range(total)), torch.arange(rows)
    return sorted({0, total - 1}), torch.linspace(0, rows - 1, min(rows, _CHECKED_ROWS)).long()


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    return x.flatten(0, 1)[heads].unsqueeze(1)  # [len(heads), 1, tokens, D]


@lru_cache(maxsize=2)
def _expected(setting: Setting, modulated: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's results on the subset, in float64 and in the dtype under test; strength 0 for plain attention."""
    inputs = _inputs(setting)
    heads, rows = _subset(setting.workload)
    q, k, v, grad_out = (_heads(x, heads) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    strength = _heads(inputs.strength.expand(inputs.q.shape[:3])[..., None], heads)[..., 0]
    words = inputs.q_regions[rows], inputs.k_regions

    def results(dtype: torch.dtype) -> list[Tensor]:
        part = Inputs(q[:, :, rows].to(dtype), k.to(dtype), v.to(dtype), grad_out[:, :, rows].to(dtype), *words,
                      strength[:, :, rows] * modulated)  # fmt: skip
        call = lambda q, k, v: reference.layout_attention(q, k, v, *words, part.strength)[0]  # noqa: E731
        return run(call, part, part.grad_out, setting.backward)

    return results(torch.float64), results(setting.dtype)


def _worst(got: list[Tensor], exact: list[Tensor], plain: list[Tensor], dtype: torch.dtype) -> tuple[float, float]:
    verdicts = [judge(*results, dtype) for results in zip(got, exact, plain)]
    return max(verdicts, key=lambda verdict: verdict[0] / max(verdict[1], 1e-300))


def _timed(call: Callable[[], Result]) -> tuple[Result, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def measure(case: Case, benchmark: Any) -> dict[str, Any]:
    """The row of a case: pytest-benchmark times the contender, whose partner runs before each round.

    The partner is this library, or plain SDPA for the library's own row, so `ratio`, the median over rounds of
    (time of the contender / time of the library), compares neighbours in time.
    """
    row = describe(case)
    reason = why_not(case)
    if reason is not None:
        return row | {"reason": reason}
    ours = case.contender == "dense_attn"
    partner = trial(Case(case.setting, "sdpa" if ours else "dense_attn"))
    try:
        contender = trial(case)
    except (RuntimeError, NotImplementedError) as error:
        if ours:
            raise
        return row | {"reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    heads, rows = _subset(case.setting.workload)
    row |= {
        "error": contender.error,
        "allowed": contender.allowed,
        "checked": f"{len(rows)} rows of {len(heads)} heads",
    }
    if not right(contender, ours):
        return row | {"reason": f"error {contender.error:.2g} where {contender.allowed:.2g} is allowed", "wrong": True}

    pair = contender.seconds + partner.seconds
    rounds = 1 if pair > _SLOW else max(3, min(100, round(_SECONDS / pair)))
    beside: list[float] = []
    benchmark.pedantic(contender.run, setup=lambda: beside.append(_timed(partner.run)[1]), rounds=rounds)
    if benchmark.stats is None:  # --benchmark-disable
        return row | {"reason": "timing is switched off"}
    times = benchmark.stats.stats.data
    row |= _spread("seconds", times) | {"rounds": rounds, "peak_extra_bytes": contender.peak_extra_bytes}
    row["gflop_per_s"] = case.setting.workload.gflop(case.setting.backward) / row["seconds"]
    if not ours and right(partner, True):
        row |= _spread("ratio", [mine / theirs for mine, theirs in zip(times, beside)])
    return row


def right(trial: Trial, ours: bool) -> bool:
    """The library keeps its rule; a baseline, whose rounding is not ours to promise, must compute the same function."""
    return trial.error <= trial.allowed * (1 if ours else _BASELINE_SLACK)


def describe(case: Case) -> dict[str, Any]:
    """What a row is about."""
    setting, workload = case.setting, case.setting.workload
    return {
        "workload": workload.name, "contender": case.contender, "backend": backend(case),
        "pass": setting.passes, "dtype": setting.dtype_name,
        "batch": workload.batch, "num_heads": workload.num_heads,
        "seqlen_q": workload.seqlen_q, "seqlen_k": workload.seqlen_k, "head_dim": workload.head_dim,
    }  # fmt: skip


def _spread(name: str, values: list[float]) -> dict[str, float | None]:
    """Median and interquartile range, None for fewer than three values."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 2 else None
    return {name: statistics.median(values), f"{name}_iqr": quartiles and quartiles[2] - quartiles[0]}
