"""The rows of the suite: which contender runs on which workload, and why some are left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from dense_attn import _backends

from .baselines import CONTENDERS
from .workloads import WORKLOADS, Workload

GIB = 2**30
MAX_SCORES = 5 * GIB  # what the N x N matrices of one call may take together
MAX_GFLOP = {False: 1200, True: 320}  # forward, with backward: some seconds a call on two cores
_QUICK = ("sd15-self-64", "sd15-cross-64", "long-self-1k", "long-self-2k")
_SCORES_ALIVE = {False: 4, True: 12}  # N x N matrices alive at once in eager PyTorch, forward and with backward


@dataclass(frozen=True)
class Setting:
    """What is computed: everything that is compared shares it."""

    workload: Workload
    dtype: torch.dtype
    backward: bool

    @property
    def passes(self) -> str:
        return "fwd+bwd" if self.backward else "fwd"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Case:
    """One row: a contender in a setting."""

    setting: Setting
    contender: str

    def __str__(self) -> str:
        setting = self.setting
        return f"{setting.workload.name}-{setting.passes}-{setting.dtype_name}-{self.contender}"

    @property
    def quick(self) -> bool:
        """In the suite of a minute."""
        name = self.setting.workload.name
        if self.contender in ("dense_attn", "sdpa"):
            return name == "sd15-self-32" or (name in _QUICK and not self.setting.backward)
        return name in ("sd15-self-32", "sd15-cross-64") and not self.setting.backward


def cases(quick: bool = False, names: list[str] | None = None) -> Iterator[Case]:
    """All rows of the workloads named, of the CPU's without names."""
    for workload in WORKLOADS.values():
        if (names and workload.name not in names) or (not names and workload.device != "cpu"):
            continue
        for backward in (False, True):
            for dtype in (torch.float32, torch.bfloat16):
                for contender in CONTENDERS:
                    case = Case(Setting(workload, dtype, backward), contender)
                    if (contender.startswith("flex") and not workload.flex) or (quick and not case.quick):
                        continue
                    yield case


def why_not(case: Case) -> str | None:
    """The reason why a row is not measured, or None."""
    setting, workload = case.setting, case.setting.workload
    if workload.device != "cpu":
        return "needs a GPU, and this suite times CPUs alone"
    if case.contender.startswith("flex") and setting.backward:
        return "FlexAttention has no backward on a CPU"
    gflop = workload.gflop(setting.backward)
    if gflop > MAX_GFLOP[setting.backward]:
        return f"one call is {gflop:,.0f} GFLOP, more than the suite's {MAX_GFLOP[setting.backward]:,}"
    if case.contender in ("eager", "sdpa-bias") or backend(case) == "reference":
        scores = workload.pairs * setting.dtype.itemsize * _SCORES_ALIVE[setting.backward]
        if scores > MAX_SCORES:
            return f"about {scores / GIB:.0f} GiB of scores, more than the suite's {MAX_SCORES / GIB:.0f} GiB"
    return None


def backend(case: Case) -> str | None:
    """Which of the library's backends runs a row, None for a baseline."""
    if case.contender != "dense_attn":
        return None
    probe = torch.empty(0, 1, 1, case.setting.workload.head_dim, dtype=case.setting.dtype)
    return _backends.resolve("auto", "layout_attention", probe)
