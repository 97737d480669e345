"""Rows too long for a buffer of candidates: searched by all threads, digit by digit, to the same
bits.
"""

from __future__ import annotations

import pytest
import torch
from cases import backends
from torch import Tensor

from dense_attn import percentile_mask
from dense_attn.verify.sega import exact_quantile

LENGTH = 150_001  # the CPU kernel gathers up to 65,536 candidates
every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu"))


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
    middle = (LENGTH // 2 - 1) / (
        LENGTH - 1
    )  # the last of the first half; a little more lies between the halves
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
