"""Step kernels of reversible DDIM beside eager PyTorch, and copies, which move as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dense_attn import reference
from dense_attn._backends import table

from ..harness import machine
from ..harness.measure import (
    BY_BACKEND,
    OURS,
    Entry,
    Latest,
    Row,
    Setting,
    Trial,
    of_here,
    tried,
    wanted,
    worst,
)
from ..harness.measure import measure as measure_row

SIZES = {"1m": 2**20, "16m": 2**24, "256m": 2**28, "1g": 2**30}
GIB = 2**30
_A, _B, _GUIDANCE, _MIX = 1.01, -0.02, 7.5, 0.93
_GRID = 2.0**26
_SLICE = 2**18  # values that are checked at the start, in the middle and at the end
_SHARE_OF_MEMORY = 0.75


@dataclass(frozen=True)
class Op:
    """A step kernel: what it reads, what it writes, and the call as a sampler makes it."""

    floats: int  # float32 inputs
    grids: int  # int64 inputs, which come first
    writes: int  # bytes an element
    eager: int  # bytes an element that eager PyTorch holds beyond inputs, results included
    call: Callable[..., Any]  # (kernels, *inputs)

    @property
    def reads(self) -> int:
        """Bytes an element that are read."""
        return 4 * self.floats + 8 * self.grids

    @property
    def moves(self) -> int:
        """Bytes an element that are read or written."""
        return self.reads + self.writes


_ON_GRID = 0.02 * _GRID, _MIX, True, 1 / _GRID, False, torch.float32
OPS = {
    "ddim-step": Op(2, 0, 4, 12, lambda k, x, e: k.ddim_step(x, e, None, _A, _B, 1.0)),
    "ddim-step-cfg": Op(3, 0, 4, 16, lambda k, x, e, u: k.ddim_step(x, e, u, _A, _B, _GUIDANCE)),
    "leapfrog": Op(3, 0, 4, 12, lambda k, x, y, e: k.leapfrog_step(x, y, e, 1.0, -0.02, 0.03)),
    "edict-mix": Op(3, 0, 8, 16, lambda k, x, y, e: k.edict_mix(x, y, e, _A, _B, _MIX, True)),
    "exact-mix": Op(1, 2, 20, 48, lambda k, x, y, e: k.exact_mix(x, y, e, *_ON_GRID)),
}
WORKLOADS = {f"{op}-{size}": (op, size) for op in OPS for size in SIZES if size != "1g"}
GPU_WORKLOADS = {f"{op}-1g": (op, "1g") for op in OPS}
CONTENDERS = (OURS, "eager", "clone", "copy")
GPU_CONTENDERS = (*CONTENDERS, *BY_BACKEND)


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names."""
    workloads = [*WORKLOADS, *(GPU_WORKLOADS if machine.on_gpu() else ())]
    contenders = of_here(CONTENDERS, GPU_CONTENDERS)
    rows = (Entry(_setting(name), contender) for name in workloads for contender in contenders)
    few = "-256m" if machine.on_gpu() else "-1m"
    return wanted(rows, quick, names, lambda entry: entry.setting.workload.endswith(few))


def _setting(name: str) -> Setting:
    return Setting(name, "fwd", "int64" if _op_and_size(name)[0].grids else "float32")


def _op_and_size(name: str) -> tuple[Op, int]:
    """The op of a workload, and how many elements it runs on."""
    op, size = (WORKLOADS | GPU_WORKLOADS)[name]
    return OPS[op], SIZES[size]


@dataclass(frozen=True)
class Inputs:
    """An op's inputs, those of a copy that moves as many bytes, and the trials so far."""

    tensors: list[Tensor]
    source: Tensor
    trials: dict[str, Trial]


@Latest
def _prepared(setting: Setting) -> Inputs:
    op, size = _op_and_size(setting.workload)
    generator = torch.Generator().manual_seed(0)
    device = machine.current().device

    def randn() -> Tensor:
        tile = torch.randn(min(size, 2**22), generator=generator).to(device)
        return tile.repeat(size // len(tile))

    grids = [randn().mul_(_GRID).long() for _ in range(op.grids)]
    tensors = grids + [randn() for _ in range(op.floats)]
    return Inputs(tensors, torch.ones(size * op.moves // 8, device=device), {})


def trial(entry: Entry) -> Trial:
    """Check a contender on three slices: by the reference in float64, on the grid bit for bit."""
    inputs = _prepared(entry.setting)
    if entry.contender not in inputs.trials:
        call = calls(entry, inputs)
        inputs.trials[entry.contender] = tried(call, lambda got: _judged(entry, inputs, got))
    return inputs.trials[entry.contender]


def calls(entry: Entry, inputs: Inputs) -> Callable[[], list[Tensor]]:
    """The call that is timed."""
    if entry.contender == "clone":  # a new tensor, as the kernels' results are
        return lambda: [inputs.source.clone()]
    if entry.contender == "copy":
        target = torch.empty_like(inputs.source)
        return lambda: [target.copy_(inputs.source)]
    kernels = reference if entry.contender == "eager" else _kernels(entry, inputs.tensors[0])
    call = _op_and_size(entry.setting.workload)[0].call
    return lambda: _listed(call(kernels, *inputs.tensors))


def _judged(entry: Entry, inputs: Inputs, got: list[Tensor]) -> tuple[float, float]:
    """(error, allowed) on the slices."""
    size = len(inputs.tensors[0])
    count = min(_SLICE, size)
    starts = (0, (size - count) // 2, size - count)
    if entry.contender in ("clone", "copy"):
        return float(not torch.equal(got[0], inputs.source)), 0.0
    parts = [torch.cat([x[start : start + count] for start in starts]) for x in inputs.tensors]
    got = [torch.cat([x[start : start + count] for start in starts]) for x in got]
    op, _ = _op_and_size(entry.setting.workload)
    plain = _listed(op.call(reference, *parts))
    if op.grids:
        return max((a.double() - b.double()).abs().max().item() for a, b in zip(got, plain)), 0.0
    exact = _listed(op.call(reference, *(x.double() for x in parts)))
    return worst(got, exact, plain, torch.float32)


def _listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _kernels(entry: Entry, x: Tensor) -> ModuleType:
    return table.NAMESPACES[table.resolve(entry.asked, "ReversibleSampler", x)]


def why_not(entry: Entry) -> str | None:
    """The reason why a row is not measured, or None."""
    op, size = _op_and_size(entry.setting.workload)
    copied = op.moves // 2
    results = {"eager": op.eager, "clone": copied, "copy": copied}  # of the others what is written
    most = max(results.get(name, op.writes) for name in (entry.contender, _partner(entry)))
    needed = size * (op.reads + copied + most)
    physical = machine.current().memory_bytes()
    if needed <= _SHARE_OF_MEMORY * physical:
        return None
    most = f"{_SHARE_OF_MEMORY:.0%} of this machine's {physical / GIB:.0f}"
    return f"about {needed / GIB:.0f} GiB, more than {most}"


def _partner(entry: Entry) -> str:
    return "clone" if entry.contender == OURS else OURS


def measure(entry: Entry, benchmark: Any) -> Row:
    """The row of an entry; the library's own has the clone as its partner.

    A copy's row has `of_copy`, the library's bytes a second over those of the copy, which moves as
    many.
    """
    op, size = _op_and_size(entry.setting.workload)
    row = entry.describe("steps", [size], "ReversibleSampler")
    reason = row.get("reason") or why_not(entry)
    if reason is not None:
        return row | {"reason": reason}
    with torch.no_grad():
        partner = Entry(entry.setting, _partner(entry))
        row = measure_row(row, lambda: trial(entry), lambda: trial(partner), benchmark)
    row["checked"] = f"3 times {min(_SLICE, size)} of {size} elements"
    if "seconds" in row:
        row["gb_per_s"] = 1e-9 * op.moves * size / row["seconds"]
        if entry.contender in ("clone", "copy") and "ratio" in row:
            row["of_copy"] = row["ratio"]
    return row
