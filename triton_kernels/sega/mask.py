"""Percentile masks: a row in one program, or a tile of a row whose threshold is known."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.sega.rows import load_candidates
from dense_attn.triton_kernels.sega.selection import quantiles_of


@triton.jit
def mask_tile(x, masked_ptr, threshold, row, num_values, start, BLOCK: tl.constexpr):
    """One tile of a row: x where |x| >= threshold, else 0."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < num_values
    value = tl.load(x[0] + row * x[3] + offs * x[4], mask=mask, other=0.0)
    kept = tl.abs(value.to(tl.float32)) >= threshold
    tl.store(masked_ptr + row * num_values + offs, tl.where(kept, value, 0.0), mask=mask)


@triton.jit
def percentile_mask_kernel(
    x,
    masked_ptr,
    thresholds_ptr,
    num_values,
    rank: tl.float64,
    LOW_BIT: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A whole row."""
    row = tl.program_id(0).to(tl.int64)
    there = tl.full((1, 1), True, tl.int1)
    candidates = load_candidates(x, None, 1.0, 0, 0, row, 1, num_values, None, False, BLOCK, TILE)
    ranks = tl.full((1,), rank, tl.float64)
    threshold = tl.sum(quantiles_of(candidates, there, num_values, ranks, LOW_BIT), axis=0)
    tl.store(thresholds_ptr + row, threshold)
    for start in range(0, num_values, TILE):
        mask_tile(x, masked_ptr, threshold, row, num_values, start, TILE)


@triton.jit
def mask_kernel(x, masked_ptr, thresholds_ptr, num_values, TILE: tl.constexpr):
    """One tile of a row whose threshold is known."""
    tiles = tl.cdiv(num_values, TILE)
    row, start = (
        (tl.program_id(0) // tiles).to(tl.int64),
        (tl.program_id(0) % tiles).to(tl.int64) * TILE,
    )
    mask_tile(x, masked_ptr, tl.load(thresholds_ptr + row), row, num_values, start, TILE)
