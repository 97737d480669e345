"""The rows of the suite: which contender runs on which workload, and why some are left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dense_attn._backends import table

from ..harness import machine
from ..harness.measure import BY_BACKEND, OURS
from .baselines import CONTENDERS, PLAIN, RANGE_ALONE
from .gpu_baselines import GPU_CONTENDERS, MATERIALISED, TRAINED
from .workloads import Workload, workloads

GIB = 2**30
MAX_SCORES = 5 * GIB  # what the N x N matrices of one call may take together on a CPU
MAX_GFLOP = {False: 1200, True: 320}  # forward, with backward: some seconds a call on two cores
_SHARE = 0.6  # of the memory of a GPU, and of a CPU for a user's own shapes
_QUICK = ("sd15-self-64", "sd15-cross-64", "long-self-1k", "long-self-2k")
_GPU_QUICK = ("sd15-self-64", "sdxl-self-64", "sd15-cross-64", "flux-joint-1024")
_ASKED = {
    torch.bfloat16: tuple(GPU_CONTENDERS),
    torch.float16: (*(name for name in GPU_CONTENDERS if name.startswith(OURS)), *PLAIN),
    torch.float32: (OURS, "sdpa", "eager"),
}
_WIDE = ("sd15-self-64", "sd15-cross-64", "flux-joint-1024")  # in float32 too
NEED_FLEX = ("flex-naive", "flex-smart", "flash-channels")  # a compilation for every shape
# N x N matrices alive at once in eager PyTorch, forward and with backward.
_SCORES_ALIVE = {False: 4, True: 12}


@dataclass(frozen=True)
class Setting:
    """The computation that everything that is compared shares."""

    workload: Workload
    dtype: torch.dtype
    backward: bool
    alone: bool = False  # the backward pass without the forward pass that it follows

    @property
    def passes(self) -> str:
        return "bwd" if self.alone else "fwd+bwd" if self.backward else "fwd"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Entry:
    """One row to be measured: a contender in a setting."""

    setting: Setting
    contender: str

    def __str__(self) -> str:
        setting = self.setting
        return f"{setting.workload.name}-{setting.passes}-{setting.dtype_name}-{self.contender}"

    @property
    def ours(self) -> bool:
        """Whether the contender is one of the library's own ways."""
        return self.contender.startswith(OURS)

    @property
    def modulated(self) -> bool:
        """Whether the contender modulates, and is not plain attention."""
        return self.contender not in PLAIN

    @property
    def quick(self) -> bool:
        """Whether it is in the suite of a minute."""
        name = self.setting.workload.name
        if self.setting.workload.own:
            return self._own_quick
        if self.contender in ("dense_attn", "sdpa"):
            return name == "sd15-self-32" or (name in _QUICK and not self.setting.backward)
        return name in ("sd15-self-32", "sd15-cross-64") and not self.setting.backward

    @property
    def gpu_quick(self) -> bool:
        """Whether a GPU's suite of three minutes has it: what bars ask for, the library's ways."""
        setting = self.setting
        if setting.workload.own:
            return self._own_quick
        if setting.workload.name not in _GPU_QUICK or setting.dtype != torch.bfloat16:
            return False
        return not (setting.backward and not setting.alone) and self.contender != "flex-naive"

    @property
    def _own_quick(self) -> bool:
        return not self.setting.backward and self.contender not in NEED_FLEX


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of the machine's without names."""
    for workload in workloads():
        if (names and workload.name not in names) or (not names and not _runs_here(workload)):
            continue
        left_out = RANGE_ALONE if workload.modulation != "range" else ()
        left_out = left_out if workload.flex else NEED_FLEX
        # Where keys are many, "auto" takes it too.
        left_out += () if workload.kind == "cross" else ("dense_attn-triton",)
        for entry in _gpu_rows(workload) if machine.on_gpu() else _cpu_rows(workload):
            is_quick = entry.gpu_quick if machine.on_gpu() else entry.quick
            if entry.contender not in left_out and (is_quick or not quick):
                yield entry


def _dtypes(workload: Workload, usual: tuple[torch.dtype, ...]) -> tuple[torch.dtype, ...]:
    """The dtypes that a user's own shape names, else the usual ones."""
    return tuple(getattr(torch, name) for name in workload.dtypes) or usual


def _cpu_rows(workload: Workload) -> Iterator[Entry]:
    for backward in (False, True):
        for dtype in _dtypes(workload, (torch.float32, torch.bfloat16)):
            yield from (
                Entry(Setting(workload, dtype, backward), contender) for contender in CONTENDERS
            )


def _gpu_rows(workload: Workload) -> Iterator[Entry]:
    """Everything in bfloat16, the fastest of all ways in float16, a few in float32; few have a
    backward pass.

    A shape of the user's own has everything in every dtype.
    """
    for backward, alone in ((False, False), (True, False), (True, True)):
        for dtype in _dtypes(workload, (torch.bfloat16, torch.float16, torch.float32)):
            for contender in GPU_CONTENDERS:
                wide = dtype != torch.float32 or workload.name in _WIDE
                asked = workload.own or (wide and contender in _ASKED[dtype])
                if asked and (contender in TRAINED or not backward):
                    yield Entry(Setting(workload, dtype, backward, alone), contender)


def _runs_here(workload: Workload) -> bool:
    return workload.device == "cpu" or machine.on_gpu()


def why_not(entry: Entry) -> str | None:
    """The reason why a row is not measured, or None."""
    setting, workload = entry.setting, entry.setting.workload
    if not _runs_here(workload):
        return "needs a GPU, and this suite times CPUs alone"
    if setting.backward and workload.groups > 1:
        return "gradients of k and v are sums over heads, of which few are checked"
    if entry.contender.startswith("flex") and setting.backward and not machine.on_gpu():
        return "FlexAttention has no backward on a CPU"
    if entry.contender in BY_BACKEND and (reasons := _reasons(BY_BACKEND[entry.contender], entry)):
        return "; ".join(reasons)
    if machine.on_gpu() or workload.own:
        return _too_much_memory(entry, _SHARE * machine.current().memory_bytes())
    gflop, most = workload.gflop(setting.backward), MAX_GFLOP[setting.backward]
    if gflop > most:
        return f"one call is {gflop:,.0f} GFLOP, more than the suite's {most:,}"
    return _too_much_memory(entry, MAX_SCORES)


def _too_much_memory(entry: Entry, most: float) -> str | None:
    """The reason why a row's inputs and results, or its matrices of scores, do not fit, or None."""
    setting, workload = entry.setting, entry.setting.workload
    tokens = 4 * workload.batch * workload.num_heads * (workload.seqlen_q + workload.seqlen_k)
    tensors = tokens * workload.head_dim * torch.float32.itemsize  # in which random numbers come
    room = f"more than the suite's {most / GIB:,.1f} GiB"
    if tensors > most:
        return f"about {tensors / GIB:,.1f} GiB of inputs and results, {room}"
    if entry.contender not in MATERIALISED and backend(entry) != "reference":
        return None
    scores = workload.pairs * setting.dtype.itemsize * _SCORES_ALIVE[setting.backward]
    return f"about {scores / GIB:,.1f} GiB of scores, {room}" if scores > most else None


def backend(entry: Entry) -> str | None:
    """Which of the library's backends runs a row, None for a baseline."""
    if not entry.ours:
        return None
    keys = entry.setting.workload.seqlen_k
    return BY_BACKEND.get(entry.contender) or table.resolve(
        "auto", "layout_attention", _probe(entry), keys
    )


def why_reference(entry: Entry) -> str | None:
    """The reason why the library's kernels do not run a row that the reference runs, or None."""
    if backend(entry) != "reference":
        return None
    kernels = "triton" if machine.on_gpu() else "cpu"
    return "; ".join(f"{kernels} {reason}" for reason in _reasons(kernels, entry))


def _reasons(kernels: str, entry: Entry) -> list[str]:
    """The reasons why a backend cannot run a row; empty if it can."""
    return table.why_not(kernels, "layout_attention", _probe(entry))


def _probe(entry: Entry) -> torch.Tensor:
    head_dim, device = entry.setting.workload.head_dim, machine.current().device
    return torch.empty(0, 1, 1, head_dim, dtype=entry.setting.dtype, device=device)
