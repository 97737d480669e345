"""Rows of [E, B, C, N] tensors as kernels read them, and the numbers of a launch's concepts.

A row of magnitudes is |edits|, or |(edits - uncond)*scale| where there is an uncond, or the sum of
those over the channels. Tensors travel as (pointer, stride, stride, ...), strides in elements.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = 8  # concepts of one launch: their numbers are arguments, which needs no copy and no waiting

MAX_BITS = tl.constexpr(0x7FFFFFFF)
PIECE = tl.constexpr(22)  # bits of a float64 that one float32 carries


@triton.jit
def bits_of(magnitudes):
    """Bits of float32 magnitudes, int32, in the same order."""
    return magnitudes.to(tl.int32, bitcast=True) & MAX_BITS


@triton.jit
def row_at(tensor, e, b, c, offs):
    """Pointers to elements of row [e, b, c] of a tensor [E, B, C, N]."""
    base = (
        tensor[0]
        + tl.cast(e, tl.int64) * tensor[1]
        + b * tensor[2]
        + tl.cast(c, tl.int64) * tensor[3]
    )
    return base + offs * tensor[4]


@triton.jit
def load_row(tensor, e, b, c, offs, mask):
    """Elements of row [e, b, c] of a tensor [E, B, C, N], as float32."""
    return tl.load(row_at(tensor, e, b, c, offs), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(tensor, e, b, c, offs, value, mask):
    """The inverse of `load_row`."""
    at = row_at(tensor, e, b, c, offs)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def load_difference(edits, uncond, scale, e, b, c, offs, mask):
    """(edits - uncond)*scale with exactly two roundings; edits where there is no uncond."""
    value = load_row(edits, e, b, c, offs, mask)
    if uncond is not None:
        value = (value - load_row(uncond, 0, b, c, offs, mask)) * scale
    return value


@triton.jit
def load_magnitudes(
    edits, uncond, scale, e, b, c, num_channels, offs, mask, SUM_CHANNELS: tl.constexpr
):
    """Magnitudes of a row, or their sum over the channels, added up in their order."""
    if SUM_CHANNELS:
        total = tl.abs(load_difference(edits, uncond, scale, e, b, 0, offs, mask))
        for channel in range(1, num_channels):
            total += tl.abs(load_difference(edits, uncond, scale, e, b, channel, offs, mask))
        return total
    else:  # noqa: RET505  what follows a return is compiled all the same
        return tl.abs(load_difference(edits, uncond, scale, e, b, c, offs, mask))


@triton.jit
def load_candidates(
    edits,
    uncond,
    scale,
    e,
    b,
    c,
    num_channels,
    num_values,
    staged,
    SUM_CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Bits of whole rows [CONCEPTS, BLOCK], of the concepts e [CONCEPTS, 1], MAX_BITS beyond their
    end; by way of `staged`, if there is one, where registers are few.
    """
    offs = tl.arange(0, BLOCK)[None, :]
    if staged is None:
        magnitudes = load_magnitudes(
            edits, uncond, scale, e, b, c, num_channels, offs, offs < num_values, SUM_CHANNELS
        )
        return tl.where(offs < num_values, bits_of(magnitudes), MAX_BITS)
    else:  # noqa: RET505  what follows a return is compiled all the same
        for start in range(0, num_values, TILE):
            part = start + tl.arange(0, TILE)[None, :]
            mask = part < num_values
            magnitudes = load_magnitudes(
                edits, uncond, scale, e, b, c, num_channels, part, mask, SUM_CHANNELS
            )
            tl.store(staged + part, bits_of(magnitudes), mask=mask)
        tl.debug_barrier()  # what one thread has staged another may fetch
        return tl.load(staged + offs, mask=offs < num_values, other=MAX_BITS)


@triton.jit
def number_of(numbers, e, GROUP: tl.constexpr):
    """The e-th of a tuple of GROUP numbers."""
    found = tl.full((), numbers[0], tl.float32)
    for i in tl.static_range(1, GROUP):
        found = tl.where(e == i, tl.full((), numbers[i], tl.float32), found)
    return found


@triton.jit
def rank_bits(ranks, e, GROUP: tl.constexpr):
    """Bits of the e-th rank, a float64, of what `ranks_of` made."""
    bits = number_of(ranks[0], e, GROUP).to(tl.int32).to(tl.int64) << (2 * PIECE)
    bits |= number_of(ranks[1], e, GROUP).to(tl.int32).to(tl.int64) << PIECE
    return bits | number_of(ranks[2], e, GROUP).to(tl.int32).to(tl.int64)


@triton.jit
def rank_of(ranks, e, GROUP: tl.constexpr):
    """The e-th rank of what `ranks_of` made, float64."""
    return rank_bits(ranks, e, GROUP).to(tl.float64, bitcast=True)


@triton.jit
def whole_rank_of(ranks, e, GROUP: tl.constexpr):
    """The e-th rank without its fraction, int64, by integers alone: conversions fuse products."""
    bits = rank_bits(ranks, e, GROUP)
    places = 1075 - (bits >> 52)  # of the significand behind the point
    significand = (bits & 0xFFFFFFFFFFFFF) | 0x10000000000000
    return significand >> tl.minimum(places, 63)
