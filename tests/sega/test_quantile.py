"""Thresholds follow one rule to the last bit on every backend, and torch.quantile but rounded."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import same_bits
from cases import backends
from torch import Tensor

from dense_attn import _checks, percentile_mask, reference
from dense_attn.verify.sega import exact_quantile

every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))
every_dtype = pytest.mark.parametrize("dtype", _checks.DTYPES, ids=str)
LEVELS = (0.0, 5e-324, 1e-42, 0.1, 0.5, 0.7, 0.9, 0.95, 0.999, 1 - 2**-53, 1.0)
KINDS = ("normal", "ties", "neighbours", "spread", "denormal", "infinite", "nan")
LENGTHS = (1, 2, 3, 100, 4096, 40_000)
INF = math.inf


def rows(kind: str, count: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(2, count, dtype=torch.float64)
    if kind == "ties":
        x = x.round()
    elif kind == "spread":  # neighbours of very different size
        x = (
            torch.exp2(40 * x.clamp(-3, 3))
            if dtype != torch.float16
            else torch.exp2(4 * x.clamp(-3, 3))
        )
    elif kind == "denormal":
        x = x * torch.finfo(dtype).smallest_normal / 8
    elif kind == "infinite":
        x[:, ::3] = -INF
    elif kind == "nan":
        x[1, count // 2] = math.nan
    x = x.to(dtype)
    return (
        torch.where(x > 0, x[:, :1], torch.nextafter(x[:, :1], 2 * x[:, :1]))
        if kind == "neighbours"
        else x
    )


@every_backend
@every_dtype
@pytest.mark.parametrize("kind", KINDS)
def test_the_rule(backend: str, dtype: torch.dtype, kind: str) -> None:
    """Rank and interpolation as Python's own floats have them, which are float64."""
    for count in LENGTHS:
        x = rows(kind, count, dtype)
        magnitudes = x.to(reference.accumulation_dtype(dtype)).abs()
        for level in LEVELS:
            masked, threshold = percentile_mask(x, level, dim=1, backend=backend)
            expected = exact_quantile(magnitudes, level)
            same_bits(threshold, expected)
            same_bits(masked, torch.where(magnitudes >= expected[:, None], x, 0))


@every_backend
@pytest.mark.parametrize(
    ("row", "level", "threshold"),
    [
        ([2.0], 0.3, 2.0),
        ([1.0, 3.0], 0.25, 1.5),
        ([1.0, INF, -INF], 0.9, INF),  # between equals, not inf - inf
        ([1.0, -INF], 0.2, INF),
        ([1.0, -INF], 0.9, INF),
        ([1.0, 2.0, INF], 0.5, 2.0),
        ([1.0, math.nan], 0.0, math.nan),
        ([1.0, 1 + 2**-23], 0.5, 1.0),  # half to even
        ([1 + 2**-23, 1 + 2**-22], 0.5, 1 + 2**-22),
        ([1.0, 1 + 2**-23], 0.5 + 2**-27, 1 + 2**-23),  # float32 has no such level
        ([0.0, 2.0**-149], 0.75, 2.0**-149),
        ([0.0, 1e30], 1e-42, 1e30 * 1e-42),
    ],
)
def test_thresholds_by_hand(backend: str, row: list[float], level: float, threshold: float) -> None:
    x = torch.tensor(row)
    masked, found = percentile_mask(x, level, dim=0, backend=backend)
    same_bits(found, torch.tensor(threshold))
    same_bits(masked, torch.where(x.abs() >= threshold, x, 0))


def units_apart(a: Tensor, b: Tensor) -> int:
    """The largest distance of positive numbers in units of their last place."""
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[a.dtype]
    return int((a.view(integers) - b.view(integers)).abs().max())


@every_backend
@every_dtype
@pytest.mark.parametrize("kind", ["normal", "ties", "neighbours", "spread", "denormal"])
def test_torch_quantile_in_float64(backend: str, dtype: torch.dtype, kind: str) -> None:
    """However it interpolates, with a rank of float64: one unit away at most, its mask ours."""
    for count in LENGTHS:
        x = rows(kind, count, dtype)
        wide = reference.accumulation_dtype(dtype)
        for level in LEVELS:
            masked, threshold = percentile_mask(x, level, dim=1, backend=backend)
            expected = torch.quantile(x.double().abs(), level, dim=1).to(wide)
            assert units_apart(threshold, expected) <= 1, (count, level)
            same_bits(masked, torch.where(x.to(wide).abs() >= expected[:, None], x, 0))


def ends(rank: float) -> tuple[int, int]:
    """The two values beside a rank."""
    return math.floor(rank), math.ceil(rank)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "spread"])
def test_torch_quantile_in_float32(backend: str, dtype: torch.dtype, kind: str) -> None:
    """One unit away, and what its rank of float32 is off; its mask ours beside the same values."""
    compared = 0
    for count in LENGTHS:
        x = rows(kind, count, dtype)
        ordered = x.double().abs().sort(1).values
        for level in LEVELS:
            rank, narrow = level * (count - 1), torch.tensor(level)
            # before torch 2.14, and from it on
            others = ((narrow * (count - 1)).item(), narrow.item() * (count - 1))
            if not ends(rank) == ends(others[0]) == ends(others[1]):
                continue
            compared += 1
            masked, threshold = percentile_mask(x, level, dim=1, backend=backend)
            expected = torch.quantile(x.float().abs(), level, dim=1)
            lower, upper = (ordered[:, index] for index in ends(rank))
            unit = torch.nextafter(expected, torch.tensor(INF)).double() - expected.double()
            off = max(abs(other - rank) for other in others)
            error = (threshold.double() - expected.double()).abs()
            assert (error <= unit + (upper - lower) * off).all(), (count, level)
            same_bits(masked, torch.where(x.float().abs() >= expected[:, None], x, 0))
    assert compared > len(LENGTHS) * len(LEVELS) / 2


@every_backend
def test_a_rank_that_float32_rounds_to_a_whole_number(backend: str) -> None:
    """0.999*39,999 is 39,959.001, and 39,959 in float32: such a rank keeps one value more."""
    x = torch.arange(40_000.0).sub(39_000).clamp(min=0)
    masked, threshold = percentile_mask(x, 0.999, dim=0, backend=backend)
    assert threshold == torch.quantile(x.double(), 0.999).float() == torch.tensor(959.001)
    assert (masked != 0).sum() == 40
    narrow = torch.quantile(x, 0.999)
    if narrow == 959:  # before torch 2.14
        assert (x >= narrow).sum() == 41
    else:
        assert narrow == torch.tensor(torch.tensor(0.999).item() * 39_999 - 39_000)
        assert (x >= narrow).sum() == 40
