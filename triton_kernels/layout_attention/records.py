"""The numbers of a row that one kernel leaves for another, by column.

Of the forward pass, STATS numbers: the largest and smallest raw score, and for matched keys and for
others the offset under which weights are exp2((raw - anchor)*factor + offset). Of the backward pass
over queries, NUMBERS for the pass over keys, and the two keys that its extremes are at.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import anchor_of

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
    "ADD_IN",
    "ADD_OUT",
    "ANCHOR",
    "TEMPERATURE",
    "SHIFT",
    "THROUGH_MAX",
    "THROUGH_MIN",
)
NUM_NUMBERS = tl.constexpr(NUMBERS)
FACTOR = tl.constexpr(0)  # of raw scores, in exponents of 2
ADD_IN = tl.constexpr(1)  # what is added to matched scores' exponents
ADD_OUT = tl.constexpr(2)  # and to those of others
ANCHOR = tl.constexpr(3)  # the raw score that exponents are measured from
TEMPERATURE = tl.constexpr(4)
SHIFT = tl.constexpr(5)  # what is taken off the weights' gradients
THROUGH_MAX = tl.constexpr(6)  # the gradient of the largest score
THROUGH_MIN = tl.constexpr(7)  # and of the smallest

PLACES = 2
NUM_PLACES = tl.constexpr(PLACES)
KEY_OF_MAX = tl.constexpr(0)
KEY_OF_MIN = tl.constexpr(1)


@triton.jit
def store_stats(lse, stats, lse_ptr, stats_ptr, row, exist):
    """lse, and what the backward pass needs, each where it is asked for."""
    if lse_ptr is not None:
        tl.store(lse_ptr + row, lse, mask=exist)
    if stats_ptr is not None:
        at = stats_ptr + row * NUM_STATS
        tl.store(at + RAW_MAX, stats[0], mask=exist)
        tl.store(at + RAW_MIN, stats[1], mask=exist)
        tl.store(at + OFFSET_IN, stats[2], mask=exist)
        tl.store(at + OFFSET_OUT, stats[3], mask=exist)


@triton.jit
def load_stats(stats_ptr, row, exist, factor, MODULATION: tl.constexpr, EXACT: tl.constexpr):
    """(raw maximum, minimum, anchor, offset of matched keys, of the others) of rows; 0 for those
    that do not exist.
    """
    at = stats_ptr + row * NUM_STATS
    high = tl.load(at + RAW_MAX, mask=exist, other=0.0)
    low = tl.load(at + RAW_MIN, mask=exist, other=0.0)
    add_in = tl.load(at + OFFSET_IN, mask=exist, other=0.0)
    add_out = tl.load(at + OFFSET_OUT, mask=exist, other=0.0)
    anchor = anchor_of(high, low, factor, MODULATION)
    if not EXACT:
        add_in, add_out = add_in - anchor * factor, add_out - anchor * factor
    return high, low, anchor, add_in, add_out


@triton.jit
def store_record(record, exist, factor, add_in, add_out, anchor, tau):
    """The numbers of a row that are known before the keys are visited."""
    tl.store(record + FACTOR, factor, mask=exist)
    tl.store(record + ADD_IN, add_in, mask=exist)
    tl.store(record + ADD_OUT, add_out, mask=exist)
    tl.store(record + ANCHOR, anchor, mask=exist)
    tl.store(record + TEMPERATURE, tau, mask=exist)


@triton.jit
def weights_of(raw, factor, anchor, offsets, EXACT: tl.constexpr):
    """The softmax's weights from raw scores, all [I, J] or broadcastable."""
    return tl.exp2(tl.fma(raw - anchor if EXACT else raw, factor, offsets))
