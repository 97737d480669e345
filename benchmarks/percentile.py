"""Threshold and mask of a percentile beside `torch.quantile` and `torch.kthvalue`: all must give the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dense_attn

from . import machine
from .measure import OURS, Case, Latest, Row, Setting, Trial, tried, wanted
from .measure import measure as measure_row

WORKLOADS = {  # name: rows and values a row
    "percentile-4x4096": (4, 4096),
    "percentile-64x4096": (64, 4096),
    "percentile-1x1m": (1, 2**20),
    "percentile-1x16m": (1, 2**24),
}
_DTYPES = ("float32", "bfloat16")
_LEVEL = 0.9


def ours(x: Tensor) -> tuple[Tensor, Tensor]:
    """This library."""
    return dense_attn.percentile_mask(x, _LEVEL, dim=-1)


def quantile(x: Tensor) -> tuple[Tensor, Tensor]:
    """torch.quantile, which sorts, and where."""
    magnitudes = x.float().abs()
    threshold = torch.quantile(magnitudes, _LEVEL, dim=-1)
    return torch.where(magnitudes >= threshold[:, None], x, 0), threshold


def kthvalue(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two order statistics, torch.quantile's interpolation between them, and where."""
    magnitudes = x.float().abs()
    rank = torch.tensor(_LEVEL) * (x.shape[-1] - 1)
    below, above = (magnitudes.kthvalue(1 + int(index), dim=-1).values for index in (rank.floor(), rank.ceil()))
    threshold = torch.lerp(below, above, (rank - rank.floor()).item())
    return torch.where(magnitudes >= threshold[:, None], x, 0), threshold


CONTENDERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    OURS: ours,
    "torch.quantile": quantile,
    "torch.kthvalue": kthvalue,
}


def cases(quick: bool = False, names: list[str] | None = None) -> Iterator[Case]:
    """All rows of the workloads named, of all without names."""
    rows = (Case(Setting(name, "fwd", dtype), who) for name in WORKLOADS for dtype in _DTYPES for who in CONTENDERS)
    return wanted(rows, (lambda case: case.setting.workload == "percentile-4x4096") if quick else None, names)


@Latest
def _prepared(setting: Setting) -> tuple[Tensor, list[Tensor], dict[str, Trial]]:
    """Random values, what torch.quantile makes of them, and the trials so far."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(WORKLOADS[setting.workload], generator=generator).to(getattr(torch, setting.dtype))
    device = machine.current().device
    return x.to(device), [result.to(device) for result in quantile(x)], {}


def trial(case: Case) -> Trial:
    """Check a contender: no bit may differ from torch.quantile's threshold, nor from its mask."""
    x, expected, trials = _prepared(case.setting)
    if case.contender not in trials:
        call = CONTENDERS[case.contender]

        # The library has the CPU's bits everywhere; a GPU's own lerp may round the last one otherwise.
        last_bit = 0.0 if case.ours or not machine.on_gpu() else torch.finfo(torch.float32).eps

        def check(got: list[Tensor]) -> tuple[float, float]:
            error = max((a.float() - b.float()).abs().max().item() for a, b in zip(got, expected))
            return error, last_bit * expected[1].max().item()

        trials[case.contender] = tried(lambda: list(call(x)), check)
    return trials[case.contender]


def measure(case: Case, benchmark: Any) -> Row:
    """The row of a case; the library's own has torch.quantile as its partner."""
    row = case.describe("percentile", WORKLOADS[case.setting.workload], "percentile_mask")
    partner = Case(case.setting, "torch.quantile" if case.contender == OURS else OURS)
    with torch.no_grad():
        return measure_row(row, lambda: trial(case), lambda: trial(partner), benchmark)
