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
    whole_rank_of,
)

# Values that one program holds: 32 of the 64 registers of each of its 1,024 threads.
LONGEST = 32768
SPAN = 8192  # values of a longer row that one program counts at a time
TILE = 2048  # that one masks or combines
NARROW = 2**31  # values of a row whose counts int32 cannot hold
MAX_PROGRAMS = 1024  # that count a row: each begins with adding up what all have counted before
WARP_SIZE = 64 if torch.version.hip else 32
_TRITON = tuple(int(part) for part in triton.__version__.split(".")[:2])
EXACT = {"enable_fp_fusion": False}  # thresholds have the very bits of the reference

INF_BITS = tl.constexpr(0x7F800000)
# Numbers of a row before its counts: its extremes, then (bits, rank) found before each pass.
EXTREMES = tl.constexpr(16)


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
    numbers = _sum_smaller(candidates, lower * 0 + (INF_BITS + 1), there)
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
def digit_found(notes, rank, INDEX: tl.constexpr, WIDTH: tl.constexpr, BINS: tl.constexpr):
    """The digits up to INDEX of a row's order statistic: (its bits so far, its rank among the
    values that share them, their number, the next digit that another value has, or BINS).
    """
    bins = tl.arange(0, BINS)
    counts = tl.load(notes + EXTREMES + INDEX * BINS + bins)
    found = rank * 0
    if INDEX > 0:
        found = tl.load(notes + 2 * INDEX).to(tl.int64)
        rank = tl.load(notes + 2 * INDEX + 1).to(tl.int64)
    up_to = tl.cumsum(counts, axis=0)
    digit = tl.sum((up_to <= rank).to(tl.int32), axis=0)
    rank -= tl.max(tl.where(up_to <= rank, up_to, 0), axis=0)
    number = tl.sum(tl.where(bins == digit, counts, 0), axis=0)
    following = tl.min(tl.where((bins > digit) & (counts > 0), bins, BINS), axis=0)
    return (found << WIDTH) + digit, rank, number, following


@triton.jit
def digit_counts_kernel(
    edits,
    uncond,
    scales,
    ranks,
    notes_ptr,
    sizes,
    num_channels,
    num_values,
    span,
    row_notes,
    GROUP: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    INDEX: tl.constexpr,
    LAST: tl.constexpr,
    BEFORE: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many values have each digit, of those whose bits above it are the ones found so far.

    The first digit comes with the largest value, which tells of NaN, the last one with the smallest
    value above the ones that are counted.
    """
    e, b, c = row_of(sizes)
    scale = number_of(scales, e, GROUP)
    notes = notes_ptr + tl.program_id(0).to(tl.int64) * row_notes
    found = tl.full((), 0, tl.int32)
    if INDEX > 0:
        rank = whole_rank_of(ranks, e, GROUP)
        digit, rank, _, _ = digit_found(notes, rank, INDEX - 1, BEFORE, BINS)
        found = digit.to(tl.int32)
        if tl.program_id(1) == 0:
            tl.store(notes + 2 * INDEX, found)
            tl.store(notes + 2 * INDEX + 1, rank)
    counts = tl.zeros((BINS,), tl.int32)
    extreme = tl.zeros((BLOCK,), tl.int32)
    first, last = span_of(num_values, span)
    for start in range(first, last, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < last
        bits = bits_of(
            load_magnitudes(edits, uncond, scale, e, b, c, num_channels, offs, mask, SUM_CHANNELS)
        )
        above = bits >> (SHIFT + WIDTH)
        digits = (bits >> SHIFT) & ((1 << WIDTH) - 1)
        counts += tl.histogram(digits, BINS, mask=mask & (above == found))
        if INDEX == 0:
            extreme = tl.maximum(extreme, bits)
        if LAST:
            extreme = tl.maximum(extreme, tl.where(above > found, bits ^ MAX_BITS, 0))
    at = notes + EXTREMES + INDEX * BINS + tl.arange(0, BINS)
    counts = counts.to(notes_ptr.dtype.element_ty)
    tl.atomic_add(at, counts, mask=counts > 0, sem="relaxed")
    if INDEX == 0 or LAST:
        furthest = tl.max(extreme, axis=0).to(notes_ptr.dtype.element_ty)
        tl.atomic_max(notes + (1 if LAST else 0), furthest, sem="relaxed")


@triton.jit
def thresholds_kernel(
    notes_ptr,
    thresholds_ptr,
    ranks,
    sizes,
    row_notes,
    GROUP: tl.constexpr,
    INDEX: tl.constexpr,
    SHIFT: tl.constexpr,
    WIDTH: tl.constexpr,
    BINS: tl.constexpr,
):
    """Each row's threshold, between two order statistics, or NaN where the row has one."""
    row = tl.program_id(0).to(tl.int64)
    e, _, _ = row_of(sizes)
    notes = notes_ptr + row * row_notes
    whole = whole_rank_of(ranks, e, GROUP)
    found, rank, number, following = digit_found(notes, whole, INDEX, WIDTH, BINS)
    largest, above = tl.load(notes), tl.load(notes + 1).to(tl.int32) ^ MAX_BITS
    lower = (found << SHIFT).to(tl.int32)
    next_bits = (((found >> WIDTH << WIDTH) + following) << SHIFT).to(tl.int32)
    next_bits = tl.where(following < BINS, next_bits, above)
    exact = rank_of(ranks, e, GROUP)
    fraction = exact - exact.to(tl.int64).to(tl.float64)
    next_bits = tl.where((fraction == 0.0) | (number > rank + 1), lower, next_bits)
    threshold = interpolate(lower, next_bits, fraction)
    tl.store(thresholds_ptr + row, tl.where(largest > INF_BITS, float("nan"), threshold))


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
    """Quantiles of rows of any length, into thresholds [E, B, C or 1]: one pass over the values for
    each digit.
    """
    num_rows, sizes = thresholds.numel(), (thresholds.shape[2], thresholds.shape[1])
    span = triton.cdiv(max(SPAN, triton.cdiv(num_values, MAX_PROGRAMS)), SPAN) * SPAN
    widths = digits(31 - low_bit)
    bins = 1 << widths[0]
    # Extremes and what each pass has found, then how many values have each digit.
    row_notes = EXTREMES.value + len(widths) * bins
    kind = torch.int32 if num_values < NARROW else torch.int64
    notes = thresholds.new_zeros((num_rows, row_notes), dtype=kind)
    # Sums take registers, and so do addresses of values that are not neighbours.
    apart = edits[4] != 1 or (uncond is not None and uncond[4] != 1)
    fewer = sum_channels + apart
    source = {"GROUP": GROUP, "SUM_CHANNELS": sum_channels, "BLOCK": SPAN >> fewer}
    source |= {"num_warps": warps(SPAN, 32), "BINS": bins, **EXACT}
    numbers = (sizes, num_channels, num_values, span, row_notes)
    grid, shift = (num_rows, triton.cdiv(num_values, span)), 31
    for index, width in enumerate(widths):
        shift -= width
        digit = {"INDEX": index, "SHIFT": shift, "WIDTH": width}
        before = {"LAST": index + 1 == len(widths), "BEFORE": widths[index - 1]}
        tensors = (edits, uncond, scales, ranks, notes)
        digit_counts_kernel[grid](*tensors, *numbers, **digit, **before, **source)
    options = {"GROUP": GROUP, "BINS": bins, "num_warps": warps(bins), **EXACT}
    thresholds_kernel[(num_rows,)](notes, thresholds, ranks, sizes, row_notes, **digit, **options)


def digits(bits: int) -> list[int]:
    """Widths of the digits in which bits are found, the widest first: as few as histograms allow,
    which count by atomics on NVIDIA's from Triton 3.8 on, and else by a vote for each bin.
    """
    atomics = WARP_SIZE == 32 and _TRITON >= (3, 8)
    count = triton.cdiv(bits, 11 if atomics else 8)
    return [bits // count + (index < bits % count) for index in range(count)]
