"""Rows of layout attention: the contenders of `baselines.py` on the workloads of `workloads.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from dense_attn import reference

from ..harness import machine
from ..harness.measure import OURS, Row, Trial, tried, worst
from ..harness.measure import measure as measure_row
from .baselines import CONTENDERS, PLAIN, Call
from .gpu_baselines import GPU_CONTENDERS
from .suite import Entry, Setting, backend, entries, why_not, why_reference
from .workloads import WORKLOADS, Inputs, Workload, make_inputs

__all__ = ["WORKLOADS", "entries", "measure"]

_CHECKED_ROWS = 256  # of the first and the last head, where all are too many
_CHECKED_PAIRS = 2**23  # elements of a score matrix that float64 can afford


@lru_cache(maxsize=3)  # a row's contender, its partner and their predecessor
def trial(entry: Entry) -> Trial:
    """Check a contender against the reference, then take its time and memory roughly."""
    setting, inputs = entry.setting, _inputs(entry.setting)
    call = _prepared(entry, inputs)
    heads, rows = _subset(setting.workload)
    grad_out = torch.zeros_like(inputs.grad_out)
    grad_out[:, :, rows] = inputs.grad_out[:, :, rows]  # the checked rows alone make dk and dv

    def check(got: list[Tensor]) -> tuple[float, float]:
        picked = [_heads(x, heads) for x in got]
        picked[:2] = [x[:, :, rows] for x in picked[:2]]  # out and dq
        return worst(picked, *_expected(setting, entry.modulated), setting.dtype)

    calls = partial(run, call, inputs, backward=setting.backward)
    if setting.alone:
        calls = backward_of(call, inputs)
    return tried(
        lambda: calls(grad_out),
        check,
        lambda: calls(inputs.grad_out),
        in_graph=not setting.backward,  # autograd stays on the stream of the forward pass
    )


def _prepared(entry: Entry, inputs: Inputs) -> Call:
    """A contender's call; who knows no grouped heads gets k and v with all of them, in the call."""
    prepare = (GPU_CONTENDERS if machine.on_gpu() else CONTENDERS)[entry.contender]
    groups = entry.setting.workload.groups
    if groups == 1 or entry.ours or entry.contender in PLAIN:
        return prepare(inputs)
    call = prepare(replace(inputs, k=inputs.k.repeat_interleave(groups, 1)))
    return lambda q, k, v: call(q, *(x.repeat_interleave(groups, 1) for x in (k, v)))


def run(call: Call, inputs: Inputs, grad_out: Tensor, backward: bool) -> list[Tensor]:
    """[out], or [out, dq, dk, dv]."""
    if not backward:
        with torch.no_grad():
            return [call(inputs.q, inputs.k, inputs.v)]
    return backward_of(call, inputs, again=False)(grad_out)


def backward_of(call: Call, inputs: Inputs, again: bool = True) -> Callable[[Tensor], list[Tensor]]:
    """The backward pass of one forward pass, from grad_out to [out, dq, dk, dv]; to be called once,
    or `again` and again.
    """
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = call(*leaves)

    def backward(grad_out: Tensor) -> list[Tensor]:
        grads = torch.autograd.grad(out, leaves, grad_out, retain_graph=again)
        return [out.detach(), *grads]

    return backward


@lru_cache(maxsize=1)
def _inputs(setting: Setting) -> Inputs:
    return make_inputs(setting.workload, setting.dtype)


def _subset(workload: Workload) -> tuple[list[int], Tensor]:
    """The (batch, head) pairs and query rows that are checked: all, or what float64 can afford."""
    rows, total = workload.seqlen_q, workload.batch * workload.num_heads
    if workload.pairs <= _CHECKED_PAIRS:
        return list(range(total)), torch.arange(rows)
    return sorted({0, total - 1}), torch.linspace(0, rows - 1, min(rows, _CHECKED_ROWS)).long()


def _heads(x: Tensor, heads: list[int]) -> Tensor:
    return x.flatten(0, 1)[heads].unsqueeze(1)  # [len(heads), 1, tokens, D]


@lru_cache(maxsize=2)
def _expected(setting: Setting, modulated: bool) -> tuple[list[Tensor], list[Tensor]]:
    """The reference's results on the subset, in float64 and in the dtype under test; of plain
    attention, at strength 0.
    """
    inputs = _inputs(setting)
    heads, rows = _subset(setting.workload)
    q, grad_out = (_heads(x, heads) for x in (inputs.q, inputs.grad_out))
    of_keys = [head // setting.workload.groups for head in heads]
    k, v = (_heads(x, of_keys) for x in (inputs.k, inputs.v))
    strength = _heads(inputs.strength.expand(inputs.q.shape[:3])[..., None], heads)[..., 0]
    words = inputs.q_regions[rows], inputs.k_regions

    def results(dtype: torch.dtype) -> list[Tensor]:
        picked = (x.to(dtype) for x in (q[:, :, rows], k, v, grad_out[:, :, rows]))
        modulation = inputs.modulation if modulated else "range"
        part = Inputs(*picked, *words, strength[:, :, rows] * modulated, modulation)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return reference.layout_attention(
                q, k, v, *words, part.strength, modulation=modulation
            )[0]

        return run(call, part, part.grad_out, setting.backward)

    return results(torch.float64), results(setting.dtype)


def measure(entry: Entry, benchmark: Any) -> Row:
    """The row of an entry; the library's own has plain SDPA as its partner."""
    row = describe(entry)
    reason = why_not(entry)
    if reason is not None:
        return row | {"reason": reason}
    heads, rows = _subset(entry.setting.workload)
    row["checked"] = f"{len(rows)} rows of {len(heads)} heads"
    partner = Entry(entry.setting, "sdpa" if entry.contender == OURS else OURS)
    row = measure_row(row, lambda: trial(entry), lambda: trial(partner), benchmark)
    if "seconds" in row:
        setting = entry.setting
        gflop = setting.workload.gflop(setting.backward, setting.alone)
        row["gflop_per_s"] = gflop / row["seconds"]
        if machine.on_gpu() and setting.workload.kind == "cross" and not setting.backward:
            inputs = _inputs(setting)  # q, k and v are read, out, of q's size, is written
            moved = 2 * inputs.q.nbytes + inputs.k.nbytes + inputs.v.nbytes
            row["gb_per_s"] = 1e-9 * moved / row["seconds"]
    return row


def describe(entry: Entry) -> Row:
    """A row's setting, before there are numbers."""
    setting, workload, note = entry.setting, entry.setting.workload, why_reference(entry)
    row = {
        "family": "attention",
        "workload": workload.name,
        "contender": entry.contender,
        "backend": backend(entry),
        "pass": setting.passes,
        "dtype": setting.dtype_name,
        "batch": workload.batch,
        "num_heads": workload.num_heads,
        "seqlen_q": workload.seqlen_q,
        "seqlen_k": workload.seqlen_k,
        "head_dim": workload.head_dim,
        "modulation": workload.modulation,
    }
    if workload.groups > 1:
        row["key_heads"] = workload.num_heads // workload.groups
    if workload.own:
        row["own"] = True
    return row if note is None else row | {"note": note}
