"""Exact quantiles: non-negative floats order like their bits, so bits of the answer are found by
counting.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dense_attn.triton_kernels.sega.rows import (
    GROUP,
    MAX_BITS,
    PIECE,
    bits_of,
    load_magnitudes,
    number_of,
    rank_of,
)

# Values that one program holds: 32 of the 64 registers of each of its 1,024 threads.
LONGEST = 32768
SPAN = 16384  # values of a longer row that one program counts
TILE = 2048  # of which it holds so many at a time
MAX_PROGRAMS = 1024  # that share a row: what they counted is added up by one program
WARP_SIZE = 64 if torch.version.hip else 32
EXACT = {"enable_fp_fusion": False}  # thresholds have the very bits of the reference

INF_BITS = tl.constexpr(0x7F800000)
BINS = tl.constexpr(256)  # of a digit: 8 bits


@triton.jit
def interpolate(lower_bits, upper_bits, fraction):
    """Between two order statistics, in float64, rounded once; between equals there is nothing, and
    inf - inf is NaN.
    """
    lower, upper = lower_bits.to(tl.float32, bitcast=True), upper_bits.to(tl.float32, bitcast=True)
    between = lower.to(tl.float64) + (upper.to(tl.float64) - lower.to(tl.float64)) * fraction
    return tl.where(lower_bits == upper_bits, lower, between.to(tl.float32))


@triton.jit
def quantiles_of(candidates, there, num_values, ranks, LOW_BIT: tl.constexpr):
    """Quantiles of rows of bits [CONCEPTS, BLOCK], each at its own float64 rank with a fraction;
    bits below LOW_BIT are 0 in every value. Of rows that are not `there` nothing is counted.
    """
    below = ranks.to(tl.int32)
    lower = below * 0
    # From the highest bit: the largest number that has at most `below` values below it.
    for i in range(31 - LOW_BIT):
        higher = lower | (1 << (30 - i))
        smaller = _sum_smaller(candidates, higher, there)
        lower = tl.where(smaller <= below, higher, lower)
    not_above = _sum_smaller(candidates, lower + 1, there)
    numbers = tl.sum((candidates <= INF_BITS).to(tl.int32), axis=1)
    upper = tl.min(tl.where(candidates > lower[:, None], candidates, MAX_BITS), axis=1)
    fraction = ranks - below.to(tl.float64)
    upper = tl.where((fraction == 0.0) | (not_above > below + 1), lower, upper)
    return tl.where(numbers < num_values, float("nan"), interpolate(lower, upper, fraction))


@triton.jit
def _sum_smaller(candidates, limits, there):
    """How many of each row's candidates are below its limit: the signs of differences, which take
    half of the instructions that comparisons do.
    """
    signs = (candidates - limits[:, None]).to(tl.uint32, bitcast=True) >> 31
    return tl.sum(tl.where(there, signs.to(tl.int32), 0), axis=1)


@triton.jit
def row_of(sizes):
    """(e, b, c) of this program's row, int64; sizes is (rows of a concept's sample, samples)."""
    row = tl.program_id(0).to(tl.int64)
    return row // (sizes[0] * sizes[1]), row // sizes[0] % sizes[1], row % sizes[0]


@triton.jit
def span_of(num_values, span):
    """First and last of the values that this program looks at, of its row."""
    first = tl.program_id(1).to(tl.int64) * span
    return first, tl.minimum(first + span, num_values)


@triton.jit
def digit_counts_kernel(
    edits,
    uncond,
    scales,
    counts_ptr,
    found_ptr,
    sizes,
    num_channels,
    num_values,
    span,
    shift,
    GROUP: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many values have each digit, of those whose bits above it are the ones found so far."""
    e, b, c = row_of(sizes)
    scale = number_of(scales, e, GROUP)
    found = tl.load(found_ptr + tl.program_id(0).to(tl.int64) * 3)
    counts = tl.zeros((BINS,), tl.int32)
    first, last = span_of(num_values, span)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < last
        bits = bits_of(
            load_magnitudes(edits, uncond, scale, e, b, c, num_channels, offs, mask, SUM_CHANNELS)
        )
        digits = bits >> shift
        counts += tl.histogram(digits & (BINS - 1), BINS, mask=mask & ((digits >> 8) == found))
    slot = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(counts_ptr + slot * BINS + tl.arange(0, BINS), counts)


@triton.jit
def digit_kernel(
    counts_ptr,
    found_ptr,
    ranks,
    sizes,
    num_programs,
    FIRST: tl.constexpr,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """The next digit of a row's order statistic; found is (its bits so far, its rank and their
    number among those).
    """
    row = tl.program_id(0).to(tl.int64)
    bins = tl.arange(0, BINS)
    counts = tl.zeros((BINS,), tl.int64)
    for first in range(0, num_programs, PROGRAMS):
        programs = first + tl.arange(0, PROGRAMS)
        at = (row * num_programs + programs)[:, None] * BINS + bins[None, :]
        counts += tl.sum(
            tl.load(counts_ptr + at, mask=(programs < num_programs)[:, None], other=0).to(tl.int64),
            axis=0,
        )

    if FIRST:
        e, _, _ = row_of(sizes)
        found = row * 0
        rank = rank_of(ranks, e, GROUP).to(tl.int64)
    else:
        found = tl.load(found_ptr + row * 3)
        rank = tl.load(found_ptr + row * 3 + 1)
    up_to = tl.cumsum(counts, axis=0)
    digit = tl.sum((up_to <= rank).to(tl.int64), axis=0)
    tl.store(found_ptr + row * 3, found * BINS + digit)
    tl.store(found_ptr + row * 3 + 1, rank - tl.sum(tl.where(bins < digit, counts, 0), axis=0))
    tl.store(found_ptr + row * 3 + 2, tl.sum(tl.where(bins == digit, counts, 0), axis=0))


@triton.jit
def extremes_kernel(
    edits,
    uncond,
    scales,
    extremes_ptr,
    found_ptr,
    sizes,
    num_channels,
    num_values,
    span,
    low_bit,
    GROUP: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest value above a row's order statistic, and its largest value, which tells of
    NaN.
    """
    e, b, c = row_of(sizes)
    scale = number_of(scales, e, GROUP)
    lower = (tl.load(found_ptr + tl.program_id(0).to(tl.int64) * 3) << low_bit).to(tl.int32)
    upper = tl.full((BLOCK,), MAX_BITS, tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    first, last = span_of(num_values, span)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < last
        bits = bits_of(
            load_magnitudes(edits, uncond, scale, e, b, c, num_channels, offs, mask, SUM_CHANNELS)
        )
        upper = tl.where(mask & (bits > lower), tl.minimum(upper, bits), upper)
        largest = tl.where(mask, tl.maximum(largest, bits), largest)
    slot = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(extremes_ptr + slot * 2, tl.min(upper, axis=0))
    tl.store(extremes_ptr + slot * 2 + 1, tl.max(largest, axis=0))


@triton.jit
def thresholds_kernel(
    extremes_ptr,
    found_ptr,
    thresholds_ptr,
    ranks,
    sizes,
    num_programs,
    low_bit,
    GROUP: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Each row's threshold, between two order statistics, or NaN where the row has one."""
    row = tl.program_id(0).to(tl.int64)
    e, _, _ = row_of(sizes)
    rank = rank_of(ranks, e, GROUP)
    upper = tl.full((PROGRAMS,), MAX_BITS, tl.int32)
    largest = tl.zeros((PROGRAMS,), tl.int32)
    for first in range(0, num_programs, PROGRAMS):
        programs = first + tl.arange(0, PROGRAMS)
        at = extremes_ptr + (row * num_programs + programs) * 2
        upper = tl.minimum(upper, tl.load(at, mask=programs < num_programs, other=MAX_BITS))
        largest = tl.maximum(largest, tl.load(at + 1, mask=programs < num_programs, other=0))

    lower = (tl.load(found_ptr + row * 3) << low_bit).to(tl.int32)
    # Values of these bits from its rank on.
    equal = tl.load(found_ptr + row * 3 + 2) - tl.load(found_ptr + row * 3 + 1)
    fraction = rank - rank.to(tl.int64).to(tl.float64)
    next_bits = tl.where((fraction == 0.0) | (equal > 1), lower, tl.min(upper, axis=0))
    threshold = interpolate(lower, next_bits, fraction)
    at = thresholds_ptr + row
    tl.store(at, tl.where(tl.max(largest, axis=0) > INF_BITS, float("nan"), threshold))


def fits_one_program(longest: int, num_values: int, *tensors: tuple | None) -> bool:
    """Whether one program holds a row: not too long, and offsets in it are int32; those of its
    tiles are int64.
    """
    largest = max([tensor[4] for tensor in tensors if tensor is not None])
    return num_values <= longest and num_values * largest < 2**31


def rank(level: float, num_values: int) -> float:
    """Rank of a level's quantile, with its fraction."""
    return level * (num_values - 1)


def ranks_of(levels: list[float], num_values: int) -> tuple[tuple[float, ...], ...]:
    """Ranks of the quantiles of one launch: three groups of numbers, for a float in a tuple arrives
    as a float32.
    """
    bits = [int.from_bytes(struct.pack(">d", rank(level, num_values)), "big") for level in levels]
    shifts = (2 * PIECE.value, PIECE.value, 0)
    return tuple(
        group_of(tuple(float(one >> shift & 2**PIECE.value - 1) for one in bits))
        for shift in shifts
    )


def group_of(numbers: tuple[float, ...]) -> tuple[float, ...]:
    """Numbers of one launch, padded to GROUP."""
    return (*numbers, *[0.0] * (GROUP - len(numbers)))


def warps(num_values: int, values: int = 8) -> int:
    """So many values a thread, on at most the 1,024 threads that a program has."""
    return min(max(num_values // (values * WARP_SIZE), 1), 1024 // WARP_SIZE)


def long_thresholds(
    thresholds: Tensor,
    edits: tuple,
    uncond: tuple | None,
    scales: tuple[float, ...],
    ranks: tuple[tuple, ...],
    num_channels: int,
    num_values: int,
    low_bit: int = 0,
    sum_channels: bool = False,
) -> None:
    """Quantiles of rows of any length, into thresholds [E, B, C or 1]: a digit of 8 bits at a
    time.
    """
    num_rows, sizes = thresholds.numel(), (thresholds.shape[2], thresholds.shape[1])
    span = triton.cdiv(max(SPAN, triton.cdiv(num_values, MAX_PROGRAMS)), TILE) * TILE
    programs = triton.cdiv(num_values, span)
    grid = (num_rows, programs)
    found = thresholds.new_zeros((num_rows, 3), dtype=torch.int64)
    counts = thresholds.new_empty((num_rows, programs, BINS.value), dtype=torch.int32)
    extremes = thresholds.new_empty((num_rows, programs, 2), dtype=torch.int32)
    source = {"GROUP": GROUP, "SUM_CHANNELS": sum_channels, "BLOCK": TILE}
    source |= {"num_warps": warps(TILE), **EXACT}
    numbers = (sizes, num_channels, num_values, span)

    shifts = [shift for shift in (24, 16, 8, 0) if shift + 8 > low_bit]
    for shift in shifts:
        tensors = (edits, uncond, scales, counts, found)
        digit_counts_kernel[grid](*tensors, *numbers, shift, **source)
        options = {"FIRST": shift == 24, "GROUP": GROUP, "PROGRAMS": 16, "num_warps": 8, **EXACT}
        digit_kernel[(num_rows,)](counts, found, ranks, sizes, programs, **options)
    tensors = (edits, uncond, scales, extremes, found)
    extremes_kernel[grid](*tensors, *numbers, shifts[-1], **source)
    options = {"GROUP": GROUP, "PROGRAMS": 256, "num_warps": 4, **EXACT}
    tensors = (extremes, found, thresholds, ranks)
    thresholds_kernel[(num_rows,)](*tensors, sizes, programs, shifts[-1], **options)
