"""One row of layout attention: the contenders of `baselines.py` on the workloads of
`workloads.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dense_attn import reference

from ..harness import machine
from ..harness.measure import OURS, Row, Trial, tried, worst
from ..harness.measure import measure as measure_row
from .baselines import CONTENDERS, Call
from .gpu_baselines import GPU_CONTENDERS
from .suite import Case, Setting, backend, cases, why_not, why_reference
from .workloads import WORKLOADS, Inputs, Workload, make_inputs

__all__ = ["WORKLOADS", "cases", "measure"]

_CHECKED_ROWS = 256  # of the first and the last head, where all are too many
_CHECKED_PAIRS = 2**23  # elements of a score matrix that float64 can afford


@lru_cache(maxsize=3)  # a row's contender, its partner and their predecessor
def trial(case: Case) -> Trial:
    """Check a contender against the reference, then take its time and memory roughly."""
    setting, inputs = case.setting, _inputs(case.setting)
    call = (GPU_CONTENDERS if machine.on_gpu() else CONTENDERS)[case.contender](inputs)
    heads, rows = _subset(setting.workload)
    grad_out = torch.zeros_like(inputs.grad_out)
    grad_out[:, :, rows] = inputs.grad_out[
        :, :, rows
    ]  # so that the checked rows alone make dk and dv

    def check(got: list[Tensor]) -> tuple[float, float]:
        picked = [_heads(x, heads) for x in got]
        picked[:2] = [x[:, :, rows] for x in picked[:2]]  # out and dq
        return worst(picked, *_expected(setting, case.modulated), setting.dtype)

    calls = (
        backward_of(call, inputs)
        if setting.alone
        else partial(run, call, inputs, backward=setting.backward)
    )
    return tried(
        lambda: calls(grad_out),
        check,
        lambda: calls(inputs.grad_out),
        in_graph=not setting.backward,  # autograd stays on the stream of the forward pass
    )


def run(call: Call, inputs: Inputs, grad_out: Tensor, backward: bool) -> list[Tensor]:
    """[out], or [out, dq, dk, dv]."""
    if not backward:
        with torch.no_grad():
            return [call(inputs.q, inputs.k, inputs.v)]
    return backward_of(call, inputs, again=False)(grad_out)


def backward_of(call: Call, inputs: Inputs, again: bool = True) -> Callable[[Tensor], list[Tensor]]:
    """The backward pass of one forward pass, once or `again` and again: from grad_out to [out, dq,
    dk, dv].
    """
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = call(*leaves)
    return lambda grad_out: [
        out.detach(),
        *torch.autograd.grad(out, leaves, grad_out, retain_graph=again),
    ]


@lru_cache(maxsize=1)
def _inputs(setting: Setting) -> Inputs:
    return make_inputs(setting.workload, setting.dtype)


def _subset(workload: Workload) -> tuple[list[int], Tensor]:
    """The (batch, head) pairs and the query rows whose results are checked: all, or what float64
    can afford.
    """
    rows, total = workload.seqlen_q, workload.batch * workload.num_heads
    if workload.pairs <= _CHECKED_PAIRS:
        return list(range(total)), torch.arange(rows)
    return sorted({0, total - 1}), torch.linspace(0, rows - 1, min(rows, _CHECKED_ROWS)).long()


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    return x.flatten(0, 1)[heads].unsqueeze(1)  # [len(heads), 1, tokens, D]


@lru_cache(maxsize=2)
def _expected(setting: Setting, modulated: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's results on the subset, in float64 and in the dtype under test; strength 0 for
    plain attention.
    """
    inputs = _inputs(setting)
    heads, rows = _subset(setting.workload)
    q, k, v, grad_out = (_heads(x, heads) for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out))
    strength = _heads(inputs.strength.expand(inputs.q.shape[:3])[..., None], heads)[..., 0]
    words = inputs.q_regions[rows], inputs.k_regions

    def results(dtype: torch.dtype) -> list[Tensor]:
        part = Inputs(q[:, :, rows].to(dtype), k.to(dtype), v.to(dtype), grad_out[:, :, rows].to(dtype), *words,
                      strength[:, :, rows] * modulated, inputs.modulation if modulated else "range")  # fmt: skip
        how = {"modulation": part.modulation}
        call = lambda q, k, v: reference.layout_attention(q, k, v, *words, part.strength, **how)[0]  # noqa: E731
        return run(call, part, part.grad_out, setting.backward)

    return results(torch.float64), results(setting.dtype)


def measure(case: Case, benchmark: Any) -> Row:
    """The row of a case; the library's own has plain SDPA as its partner."""
    row = describe(case)
    reason = why_not(case)
    if reason is not None:
        return row | {"reason": reason}
    heads, rows = _subset(case.setting.workload)
    row["checked"] = f"{len(rows)} rows of {len(heads)} heads"
    partner = Case(case.setting, "sdpa" if case.contender == OURS else OURS)
    row = measure_row(row, lambda: trial(case), lambda: trial(partner), benchmark)
    if "seconds" in row:
        setting = case.setting
        row["gflop_per_s"] = (
            setting.workload.gflop(setting.backward, setting.alone) / row["seconds"]
        )
        if machine.on_gpu() and setting.workload.kind == "cross" and not setting.backward:
            inputs = _inputs(setting)  # q, k and v are read, out, of q's size, is written
            row["gb_per_s"] = (
                1e-9 * (2 * inputs.q.nbytes + inputs.k.nbytes + inputs.v.nbytes) / row["seconds"]
            )
    return row


def describe(case: Case) -> Row:
    """What a row is about."""
    setting, workload = case.setting, case.setting.workload
    return {
        "family": "attention",
        "workload": workload.name, "contender": case.contender, "backend": backend(case),
        "pass": setting.passes, "dtype": setting.dtype_name,
        "batch": workload.batch, "num_heads": workload.num_heads,
        "seqlen_q": workload.seqlen_q, "seqlen_k": workload.seqlen_k, "head_dim": workload.head_dim,
        "modulation": workload.modulation,
    } | ({"own": True} if workload.own else {}) | ({"note": note} if (note := why_reference(case)) else {})  # fmt: skip
