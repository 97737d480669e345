"""Percentile masks by their definition, on rows of every kind."""

from __future__ import annotations

import math

import pytest
import torch
from accuracy import same_bits
from cases import backends
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_attn import percentile_mask, reference
from dense_attn.verify.sega import exact_quantile

every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))
properties = settings(max_examples=30, deadline=None, derandomize=True, database=None)


@st.composite
def row_problems(draw: st.DrawFn) -> tuple[Tensor, float, tuple[int, ...]]:
    """A tensor in some memory order, a level, and the axes to reduce."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    if draw(st.booleans()):
        shape[-1] = draw(st.integers(1, 3000))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** draw(
        st.integers(-6, 4)
    )
    kind = draw(st.sampled_from(["normal", "ties", "equal", "infinite", "nan"]))
    if kind == "ties":
        x = x.sign() * (x.abs() > x.abs().median())
    elif kind == "equal":
        x = torch.full_like(x, x.flatten()[0])
    elif kind in ("infinite", "nan"):
        x[torch.rand(shape, generator=generator) < 0.1] = {
            "infinite": -torch.inf,
            "nan": torch.nan,
        }[kind]
    dims = draw(st.permutations(range(len(shape))))
    x = x.to(dtype).permute(dims).contiguous().permute(torch.tensor(dims).argsort().tolist())
    level = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]) | st.floats(0, 1))
    axes = draw(
        st.lists(
            st.integers(-len(shape), len(shape) - 1), min_size=1, unique_by=lambda i: i % len(shape)
        )
    )
    return x, level, tuple(axes)


@every_backend
@settings(properties, max_examples=200)
@given(problem=row_problems())
def test_percentile_mask_is_its_definition(backend: str, problem: tuple) -> None:
    x, level, axes = problem
    masked, threshold = percentile_mask(x, level, dim=axes, backend=backend)
    kept_axes = [axis for axis in range(x.dim()) if axis not in {a % x.dim() for a in axes}]
    magnitudes = x.to(reference.accumulation_dtype(x.dtype)).abs()
    rows = magnitudes.movedim(kept_axes, list(range(len(kept_axes)))).flatten(len(kept_axes))
    expected = exact_quantile(rows, level)
    same_bits(threshold, expected)
    shape = [n if axis in kept_axes else 1 for axis, n in enumerate(x.shape)]
    same_bits(masked, torch.where(magnitudes >= expected.reshape(shape), x, 0))


@every_backend
@pytest.mark.parametrize("level", [0.5, 0.9999999])
def test_a_row_longer_than_2_to_the_24(backend: str, level: float) -> None:
    """torch.quantile refuses it before torch 2.14; small integers, whose counts order them."""
    length = 2**24 + 3
    x = torch.randint(-1000, 1001, (length,)).float()
    masked, threshold = percentile_mask(x, level, dim=0, backend=backend)
    rank = level * (length - 1)
    below = x.abs().long().bincount().cumsum(0)
    lower, upper = (
        torch.searchsorted(below, index, right=True).item()
        for index in (int(rank), math.ceil(rank))
    )
    assert threshold == torch.tensor(lower + (upper - lower) * (rank - int(rank)))
    assert torch.equal(masked, x.where(x.abs() >= threshold, torch.zeros(())))


@every_backend
@pytest.mark.parametrize("length", [1, 2, 10, 1001])
def test_how_many_entries_stay(backend: str, length: int) -> None:
    x = torch.randperm(length).sub(length // 3).mul(3).add(1).double()  # no two magnitudes alike
    for level in (0.0, 0.1, 0.5, 0.9, 0.99, 1.0):
        masked, threshold = percentile_mask(x, level, dim=0, backend=backend)
        rank = level * (length - 1)
        assert (masked != 0).sum() == length - int(-(-rank // 1)), level
        assert percentile_mask(-8 * x, level, dim=0, backend=backend)[1] == 8 * threshold


LENGTH = 150_001  # the CPU kernel gathers up to 65,536 candidates


def row(kind: str, dtype: torch.dtype) -> Tensor:
    x = torch.randn(LENGTH, dtype=dtype)
    if kind == "crowd":  # a repeated value whose next one is its neighbour in floats
        x = torch.full((LENGTH,), 1.0, dtype=dtype)
        x[LENGTH // 2 :] = torch.nextafter(x[0], x[0] + 1)
    if kind == "two-crowds":
        x = torch.where(x > 0, 1e-3, -1e3).to(dtype)
    if kind == "spread":  # over all exponents
        x = torch.exp2(torch.randint(-140, 120, (LENGTH,)).to(dtype)) * x
    if kind == "infinite":
        x[::3] = -torch.inf
    if kind == "nan":
        x[-1] = torch.nan
    return x


@every_backend
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["normal", "crowd", "two-crowds", "spread", "infinite", "nan"])
def test_long_rows(
    backend: str, threads: int, dtype: torch.dtype, kind: str, one_thread: None
) -> None:
    torch.set_num_threads(threads)
    x = row(kind, dtype)
    # the last of the first half; a little more lies between the halves
    middle = (LENGTH // 2 - 1) / (LENGTH - 1)
    for level in (0.0, 0.25, middle, middle + 2e-6, 0.9, 1.0):
        masked, threshold = percentile_mask(x, level, dim=0, backend=backend)
        expected = exact_quantile(x.abs(), level)
        assert torch.equal(threshold.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0)), level
        assert torch.equal(masked, torch.where(x.abs() >= expected, x, 0))


@every_backend
def test_a_rank_that_float32_does_not_hold(backend: str) -> None:
    """float32 holds no 2^24 + 3: the rank of level 1 would be one too large there."""
    x = torch.zeros(2**24 + 4)
    x[7], x[8] = -3.0, 2.0
    masked, threshold = percentile_mask(x, 1.0, dim=0, backend=backend)
    assert threshold == 3
    assert masked.nonzero().tolist() == [[7]]
