"""A percentile's threshold and mask beside those of `torch.quantile` and `torch.kthvalue`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import dense_attn
from dense_attn import reference

from ..harness import machine
from ..harness.measure import (
    OURS,
    Entry,
    Latest,
    Row,
    Setting,
    Trial,
    by_backend,
    of_here,
    tried,
    wanted,
)
from ..harness.measure import measure as measure_row

WORKLOADS = {  # name: rows and values a row
    "percentile-4x4096": (4, 4096),
    "percentile-64x4096": (64, 4096),
    "percentile-1x1m": (1, 2**20),
    "percentile-1x16m": (1, 2**24),
}
_DTYPES = ("float32", "bfloat16")
_LEVEL = 0.9


def ours(x: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The masked values and their threshold by this library."""
    return dense_attn.percentile_mask(x, _LEVEL, dim=-1, backend=backend)


def quantile(x: Tensor) -> tuple[Tensor, Tensor]:
    """The masked values and their threshold by torch.quantile, which sorts, and where."""
    magnitudes = x.float().abs()
    threshold = torch.quantile(magnitudes, _LEVEL, dim=-1)
    return torch.where(magnitudes >= threshold[:, None], x, 0), threshold


def kthvalue(x: Tensor) -> tuple[Tensor, Tensor]:
    """The masked values and their threshold, interpolated between two order statistics."""
    magnitudes = x.float().abs()
    rank = _LEVEL * (x.shape[-1] - 1)
    places = 1 + math.floor(rank), 1 + math.ceil(rank)
    below, above = (magnitudes.kthvalue(k, dim=-1).values.double() for k in places)
    threshold = (below + (above - below) * (rank - math.floor(rank))).float()
    return torch.where(magnitudes >= threshold[:, None], x, 0), threshold


CONTENDERS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    OURS: ours,
    "torch.quantile": quantile,
    "torch.kthvalue": kthvalue,
}
GPU_CONTENDERS = CONTENDERS | by_backend(ours)


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names."""
    rows = (
        Entry(Setting(name, "fwd", dtype), who)
        for name in WORKLOADS
        for dtype in _DTYPES
        for who in of_here(CONTENDERS, GPU_CONTENDERS)
    )
    return wanted(rows, quick, names, lambda entry: entry.setting.workload == "percentile-4x4096")


@Latest
def _prepared(setting: Setting) -> tuple[Tensor, Tensor, dict[str, Trial]]:
    """Random values, the thresholds of their magnitudes, and the trials so far."""
    generator, device = torch.Generator().manual_seed(0), machine.current().device
    x = torch.randn(WORKLOADS[setting.workload], generator=generator)
    x = x.to(getattr(torch, setting.dtype))
    return x.to(device), reference.quantile(x.float().abs(), _LEVEL).to(device), {}


def trial(entry: Entry) -> Trial:
    """Check a contender's threshold, but for torch.quantile's to the bit, and the mask by it."""
    x, expected, trials = _prepared(entry.setting)
    if entry.contender not in trials:
        call = GPU_CONTENDERS[entry.contender]
        # The ranks of torch.quantile have but the bits of float32.
        allowed = 1e-4 * expected.max().item() if call is quantile else 0.0

        def check(got: list[Tensor]) -> tuple[float, float]:
            masked, threshold = got
            right = torch.where(x.float().abs() >= threshold[:, None], x, 0)
            if not torch.equal(masked, right):
                return math.inf, 0.0
            return (threshold - expected).abs().max().item(), allowed

        trials[entry.contender] = tried(lambda: list(call(x)), check)
    return trials[entry.contender]


def measure(entry: Entry, benchmark: Any) -> Row:
    """The row of an entry; the library's own has torch.quantile as its partner."""
    row = entry.describe("percentile", WORKLOADS[entry.setting.workload], "percentile_mask")
    if "reason" in row:
        return row
    partner = Entry(entry.setting, "torch.quantile" if entry.contender == OURS else OURS)
    with torch.no_grad():
        return measure_row(row, lambda: trial(entry), lambda: trial(partner), benchmark)
