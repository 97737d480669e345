"""The numbers of a row that one kernel leaves for another, by column.

Of the forward pass, STATS numbers: the largest and smallest raw score, and for matched keys and for
others the offset under which weights are exp2((raw - anchor)*factor + offset). Of the backward pass
over queries, NUMBERS for the pass over keys, and the two keys that its extremes are at.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import LOG2_E, anchor_of

STATS = 4
STATS_COLUMNS = ("RAW_MAX", "RAW_MIN", "OFFSET_IN", "OFFSET_OUT")
NUM_STATS = tl.constexpr(STATS)
RAW_MAX = tl.constexpr(0)
RAW_MIN = tl.constexpr(1)
OFFSET_IN = tl.constexpr(2)
OFFSET_OUT = tl.constexpr(3)

NUMBERS = 8
NUMBERS_COLUMNS = (
    "FACTOR",
    "ADD_OUT",
    "GAP",
    "WORDS",
    "SHIFT",
    "ANCHOR",
    "THROUGH_MAX",
    "THROUGH_MIN",
)
NUM_NUMBERS = tl.constexpr(NUMBERS)
FACTOR = tl.constexpr(0)  # of raw scores, in exponents of 2
ADD_OUT = tl.constexpr(1)  # what is added to unmatched scores' exponents
GAP = tl.constexpr(2)  # int32: what its bits lack of those added to matched scores' exponents
WORDS = tl.constexpr(3)  # int32: regions
SHIFT = tl.constexpr(4)  # what is added to the weights' gradients times the factor
# The raw score that exact exponents are measured from; else what is added to matched scores'
ANCHOR = tl.constexpr(5)
THROUGH_MAX = tl.constexpr(6)  # the gradient of the largest score
THROUGH_MIN = tl.constexpr(7)  # and of the smallest

PLACES = 4
NUM_PLACES = tl.constexpr(PLACES)
KEY_OF_MAX = tl.constexpr(0)
KEY_OF_MIN = tl.constexpr(1)
LISTED = tl.constexpr(2)  # and the next: what the pass over keys lists of both


@triton.jit
def store_stats(lse, stats, lse_ptr, stats_ptr, row, exist, APART: tl.constexpr = False):
    """lse, and what the backward pass needs, each where it is asked for. Triton 3.6 joins nothing
    in a kernel of specialised warps: numbers are stored apart there.
    """
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse, mask=exist)
    high, low, add_in, add_out = stats
    if stats_ptr is not None and APART:
        at = stats_ptr + row * NUM_STATS
        tl.store(at + RAW_MAX, high, mask=exist)
        tl.store(at + RAW_MIN, low, mask=exist)
        tl.store(at + OFFSET_IN, add_in, mask=exist)
        tl.store(at + OFFSET_OUT, add_out, mask=exist)
    elif stats_ptr is not None:
        beside = tl.join(tl.join(high, add_in), tl.join(low, add_out))  # 16 bytes a row at once
        columns = row[:, None] * NUM_STATS + tl.arange(0, NUM_STATS)[None, :]
        numbers = tl.reshape(beside, columns.shape)
        tl.store(stats_ptr + columns, numbers, mask=exist[:, None])


@triton.jit
def load_extremes(stats_ptr, row, exist):
    """(raw maximum, minimum) of rows; 0 for those that do not exist."""
    at = stats_ptr + row * NUM_STATS
    high = tl.load(at + RAW_MAX, mask=exist, other=0.0)
    return high, tl.load(at + RAW_MIN, mask=exist, other=0.0)


@triton.jit
def load_stats(stats_ptr, row, exist, factor, MODULATION: tl.constexpr, EXACT: tl.constexpr):
    """(raw maximum, minimum, anchor, offset of matched keys, of the others) of rows; 0 for those
    that do not exist.
    """
    at = stats_ptr + row * NUM_STATS
    high, low = load_extremes(stats_ptr, row, exist)
    add_in = tl.load(at + OFFSET_IN, mask=exist, other=0.0)
    add_out = tl.load(at + OFFSET_OUT, mask=exist, other=0.0)
    anchor = anchor_of(high, low, factor, MODULATION)
    if not EXACT:
        add_in, add_out = add_in - anchor * factor, add_out - anchor * factor
    return high, low, anchor, add_in, add_out


@triton.jit
def lift_of(sm_scale, dtype: tl.constexpr):
    """The power of 2 that the pass over keys multiplies weights by, as its exponent: in float16
    gradients times `factor` would else have fewer digits than those times the temperature, or not
    fit.
    """
    lift = tl.full([], 0.0, tl.float32)
    if dtype == tl.float16:
        scale = tl.cast(sm_scale * LOG2_E, tl.float32)
        above = (scale.to(tl.int32, bitcast=True) >> 23) - 126  # scale < 2**above
        lift = tl.minimum(tl.maximum(-above, -1), 8).to(tl.float32)
    return lift


@triton.jit
def store_record(record, seqlen, exist, known, lift, EXACT: tl.constexpr):
    """The numbers of a row that are known before the keys are visited."""
    factor, add_in, add_out, anchor, words = known
    add_in, add_out = add_in + lift, add_out + lift
    gap = add_in.to(tl.int32, bitcast=True) - add_out.to(tl.int32, bitcast=True)
    tl.store(record + FACTOR * seqlen, factor, mask=exist)
    tl.store(record + ADD_OUT * seqlen, add_out, mask=exist)
    tl.store(record + GAP * seqlen, gap.to(tl.float32, bitcast=True), mask=exist)
    tl.store(record + WORDS * seqlen, words.to(tl.float32, bitcast=True), mask=exist)
    tl.store(record + ANCHOR * seqlen, anchor if EXACT else add_in, mask=exist)


@triton.jit
def places_of_columns(ROWS: tl.constexpr):
    """The row of each column of a tile of scores. A lane of NVIDIA's matrix units has two of each
    eight columns: with their rows side by side it fetches four numbers at once.
    """
    column = tl.arange(0, ROWS)
    return column // 16 * 16 + column // 2 % 4 * 4 + column // 8 % 2 * 2 + column % 2


@triton.jit
def store_extreme(record, pair, COLUMN: tl.constexpr, seqlen, exist, through, key):
    """The gradient through a row's extreme and the extreme's key, columns side by side of both."""
    tl.store(record + (THROUGH_MAX + COLUMN) * seqlen, through, mask=exist)
    tl.store(pair + COLUMN * seqlen, key, mask=exist)


@triton.jit
def load_records(records, first, seqlen, ROWS: tl.constexpr):
    """(factor, what is added to unmatched exponents, gap, words, shift, anchor) of the rows of a
    tile's columns, 0 for those that do not exist; fetched as one tile, so in wide copies.
    """
    columns, places = tl.arange(0, NUM_NUMBERS), first + tl.arange(0, ROWS)
    at = records + (columns * seqlen)[:, None] + places[None, :]
    tile = tl.load(at, mask=(places < seqlen)[None, :], other=0.0)
    tile = tl.permute(tl.reshape(tile, (2, 2, 2, ROWS // 16, 4, 2, 2)), (3, 5, 4, 6, 2, 1, 0))
    tile = tl.reshape(tile, (ROWS, 2, 2, 2))  # as `places_of_columns` has them, numbers last
    first_half, second_half = tl.split(tile)
    numbers, more = tl.split(first_half)
    shifts, _ = tl.split(second_half)
    factor, add_out = tl.split(numbers)
    gap, words = tl.split(more)
    shift, anchor = tl.split(shifts)
    gap, words = gap.to(tl.int32, bitcast=True), words.to(tl.int32, bitcast=True)
    return factor, add_out, gap, words, shift, anchor


@triton.jit
def weights_of(raw, factor, anchor, offsets, EXACT: tl.constexpr):
    """The softmax's weights from raw scores, all [I, J] or broadcastable."""
    return tl.exp2(tl.fma(raw - anchor if EXACT else raw, factor, offsets))
