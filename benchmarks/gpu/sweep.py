"""Stages, tiles and parking, timed: `python -m dense_attn.benchmarks.gpu.sweep`.

A line for each configuration: seconds, and for each kernel registers a thread, spilled bytes and
shared memory. The table's own configuration comes first of its group; a result that differs from
the table's by more than rounding is wrong, and exit code 1.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from dense_attn.triton_kernels import autotune, layout_attention
from dense_attn.triton_kernels.configs import Config

from ..harness import machine
from ..layout_attention.workloads import Workload
from . import program
from .real_sizes import Case

MODULE = "dense_attn.benchmarks.gpu.sweep"
HEAD_DIMS = (64, 128, 40)
_ROUNDINGS = 16  # of the largest element, by which two tiles' results may differ


@dataclass(frozen=True)
class Trial:
    """A configuration of a pass: "fwd", or "bwd_q" or "bwd_kv" beside the table's other half."""

    case: Case
    kernel: str
    config: Config

    def __str__(self) -> str:
        c = self.config
        tile = f"{c.BLOCK_M}x{c.BLOCK_N}-w{c.num_warps}-s{c.num_stages}"
        return f"{self.kernel}-{self.case}-{tile}{'-parks' if c.parks else ''}"

    def call(self) -> Callable[[], tuple[Tensor, ...]]:
        """The launches that are timed, inputs and tile lists made before."""
        return call_of(self.case, self.kernel, self.config)


def trials(dry: bool = False) -> list[Trial]:
    """All configurations: the table's, then stages, parking and tiles; the sorted order first."""
    size = {"side": 12, "heads": 1} if dry else {}
    dims, dtype = ((40,), "float16") if dry else (HEAD_DIMS, "bfloat16")
    found = []
    for ordered in (True, False):
        for head_dim in dims:
            case = Case(head_dim, dtype, ordered, **size)
            q = _rows(case)
            table = layout_attention.fwd_config(q, q, ordered)
            found += [Trial(case, "fwd", config) for config in forward(table)]
            if ordered:
                pair = layout_attention.bwd_config(q, q)
                for kernel, own in zip(("bwd_kv", "bwd_q"), reversed(pair)):
                    found += [Trial(case, kernel, config) for config in _stages(own)]
    return found[:: len(found) // 4] if dry else found


def _rows(case: Case) -> Tensor:
    """Room for the queries of a case, as many as its keys."""
    shape = Workload.batch, case.heads, case.side**2, case.head_dim
    return torch.empty(shape, dtype=getattr(torch, case.dtype), device=machine.current().device)


def forward(table: Config) -> list[Config]:
    """The table's configuration, its stages, its parking turned, other tiles at several stages;
    where it is specialised, the ordinary kernel's after its own.
    """
    if table.specialised:
        return [*autotune.neighbours(table), *forward(Config(128, 64, 8, 3))]
    turned = replace(table, parks=not table.parks)
    around = [
        replace(table, BLOCK_M=rows, BLOCK_N=keys, num_warps=warps, num_stages=stages)
        for rows, keys, warps in ((128, 32, 8), (64, 64, 4), (128, 128, 8))
        for stages in (3, 5)
    ]
    every = [*_stages(table), turned, replace(turned, num_stages=5), *around]
    return list(dict.fromkeys(every))


def _stages(table: Config) -> list[Config]:
    others = (replace(table, num_stages=stages) for stages in (5, 4, 3, 2))
    return list(dict.fromkeys([table, *others]))


def main(run: program.Run) -> int:
    """A line for each configuration, as it is timed; 1 if one gave another result."""
    wrong, late, best = [], 0, {}
    with program.Compilations() as compilations:
        for index, trial in enumerate(trials(run.dry)):
            if index < run.first:
                continue
            if not run.time_left:
                late += 1
                continue
            row = measured(trial, run.dry)
            program.say(trial=str(trial), **row)
            wrong += [str(trial)] * row.get("wrong", False)
            group = f"{trial.kernel}-{trial.case}"
            if "seconds" in row and not row.get("wrong"):
                best[group] = min(best.get(group, (1e9, "")), (row["seconds"], str(trial)))
            if not program.is_usable():
                wrong.append(f"{trial}, which lost the device")
                program.continued(MODULE, run, index + 1)
                break
    cache_use = {"compiled": compilations.made, "from_cache": compilations.found}
    program.say(best=best, wrong=wrong, not_reached=late, **cache_use)
    return 1 if wrong else 0


def measured(trial: Trial, dry: bool) -> dict[str, object]:
    """The row of a configuration; one that does not fit the device has a reason alone."""
    row: dict[str, object] = asdict(trial.config)
    try:
        call = trial.call()
        with nullcontext([]) if dry else recorded() as kernels:
            got = [x.float() for x in call()]
            machine.current().synchronize()
        difference = max(map(_difference, got, _of_table(trial.case, trial.kernel)))
        row |= {"seconds": autotune.seconds(call), "difference": difference}
    except OutOfResources as error:
        return row | {"reason": str(error).splitlines()[0]}
    except Exception as error:  # the compiler's, of any kind
        return row | {"reason": f"{type(error).__name__}: {str(error).splitlines()[:1]}"}
    eps = torch.finfo(getattr(torch, trial.case.dtype)).eps
    row |= {"wrong": True} if not difference <= _ROUNDINGS * eps else {}
    return row | {"kernels": kernels}


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest element; infinite where there is a NaN."""
    gap = ((got - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()
    return gap if gap == gap else 1e30


@contextmanager
def recorded() -> Iterator[list[dict[str, object]]]:
    """The usage of every attention kernel launched in its body."""
    found: list[dict[str, object]] = []
    run = JITFunction.run

    def noted(self: JITFunction, *args: object, **kwargs: object) -> object:
        kernel = run(self, *args, **kwargs)
        name = getattr(self.fn, "__name__", "")
        if name.startswith("layout_attention"):
            usage = {"registers": kernel.n_regs, "spills": kernel.n_spills}
            found.append({"kernel": name, **usage, "shared": kernel.metadata.shared})
        return kernel

    with patch.object(JITFunction, "run", noted):
        yield found


def call_of(case: Case, kernel: str, config: Config | None) -> Callable[[], tuple[Tensor, ...]]:
    """The launches of a pass under a configuration, None the table's."""
    arguments, orders, back = _prepared(case)
    q, k, _, *words, _ = arguments[:6]
    last = ("range", q.shape[3] ** -0.5, *orders)
    if kernel == "fwd":
        config = config or layout_attention.fwd_config(q, k)
        blocks = config.BLOCK_M, config.BLOCK_N
        lists = layout_attention.tile_lists(*words, *orders, *blocks)
        given = (*arguments, *last, *lists)
        plan = layout_attention.plan_fwd(*given, config=config)
        return lambda: layout_attention.layout_attention_fwd(*given, plan=plan)[:1]
    by_query, by_key = layout_attention.bwd_config(q, k)
    if config is not None:
        by_query, by_key = (config, by_key) if kernel == "bwd_q" else (by_query, config)
    grad_out, out, stats = back
    given = (grad_out, None, *arguments, out, stats, *last)
    plan = layout_attention.plan_bwd(*given, config=(by_query, by_key))
    return lambda: layout_attention.layout_attention_bwd(*given, plan=plan)[:3]


_Prepared = tuple[tuple[Tensor, ...], tuple, tuple[Tensor, ...]]


def prepare(case: Case) -> _Prepared:
    """The arguments of a forward call, its orders, and what its backward call takes beside them;
    one forward call is launched.
    """
    inputs = case.inputs()
    words = inputs.q_regions, inputs.k_regions
    strength = inputs.strength.expand(inputs.q.shape[:3]).contiguous()
    orders = (None, None)
    if case.ordered:
        orders = tuple(x.argsort(stable=True).to(torch.int32) for x in words)
    arguments = (inputs.q, inputs.k, inputs.v, *words, strength)
    scale = inputs.q.shape[3] ** -0.5
    out, _, stats = layout_attention.layout_attention_fwd(*arguments, "range", scale, *orders)
    return arguments, orders, (inputs.grad_out, out, stats)


_prepared = cache(prepare)


@cache
def _of_table(case: Case, kernel: str) -> list[Tensor]:
    return [x.float() for x in call_of(case, "fwd" if kernel == "fwd" else "bwd_q", None)()]


if __name__ == "__main__":
    sys.exit(program.start(MODULE, main))
