"""The first key with a row's largest or smallest score, by two instructions a score.

In the loop a lane keeps the extreme of its own scores and the group of keys that has it; which of
the group's keys it is, their products tell again behind the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import inner_products, load_part, store_part

# Columns of a tile that a lane of NVIDIA's matrix units holds: two of each eight, which four lanes
# share.
LANES = tl.constexpr(4)
GROUP = tl.constexpr(4)  # keys among which one that has a row's extreme is sought behind the loop


@triton.jit
def by_lanes(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """x [rows, keys] by columns as [rows, lanes, keys of a lane], in the order of keys: no exchange
    between lanes.
    """
    x = tl.permute(tl.reshape(x, [ROWS, KEYS // 8, LANES, 2]), (0, 2, 1, 3))
    return tl.reshape(x, [ROWS, LANES, KEYS // LANES])


@triton.jit
def by_columns(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """The inverse of `by_lanes`."""
    x = tl.permute(tl.reshape(x, [ROWS, LANES, KEYS // 8, 2]), (0, 2, 1, 3))
    return tl.reshape(x, [ROWS, KEYS])


@triton.jit
def keys_of_columns(KEYS: tl.constexpr):
    """The key that each column of a tile has: neighbours go to one lane, so that the order of keys
    is that of lanes, groups and columns.
    """
    column = tl.arange(0, KEYS)
    return column // 2 % LANES * (KEYS // LANES) + column // 8 * 2 + column % 2


@triton.jit
def no_extreme(ROWS: tl.constexpr, LARGEST: tl.constexpr):
    """Each lane's extreme before the first key, and its place."""
    extreme = tl.full([ROWS, LANES], float("-inf") if LARGEST else float("inf"), tl.float32)
    return extreme, tl.zeros([ROWS, LANES], tl.int32)


@triton.jit
def add_extremes(best, raw, first, LARGEST: tl.constexpr):
    """Each lane's running extreme of raw scores [rows, lanes, keys of a lane] and the place of the
    first group that has it.
    """
    ROWS: tl.constexpr = raw.shape[0]
    KEYS: tl.constexpr = LANES * raw.shape[2]
    x = tl.reshape(raw, [ROWS, LANES, KEYS // LANES // GROUP, GROUP])
    x = tl.max(x, 3) if LARGEST else tl.min(x, 3)  # [rows, lanes, groups]
    if KEYS == 16:
        best = _add_extreme(best, tl.reshape(x, [ROWS, LANES]), first, LARGEST)
    elif KEYS == 32:
        even, odd = tl.split(x)
        best = _add_extreme(best, even, first, LARGEST)
        best = _add_extreme(best, odd, first + GROUP, LARGEST)
    else:
        tl.static_assert(KEYS == 64)
        even, odd = tl.split(tl.reshape(x, [ROWS, LANES, 2, 2]))
        zero, two = tl.split(even)
        one, three = tl.split(odd)
        best = _add_extreme(best, zero, first, LARGEST)
        best = _add_extreme(best, one, first + GROUP, LARGEST)
        best = _add_extreme(best, two, first + 2 * GROUP, LARGEST)
        best = _add_extreme(best, three, first + 3 * GROUP, LARGEST)
    return best


@triton.jit
def _add_extreme(best, x, place, LARGEST: tl.constexpr):
    """One group further."""
    better = x > best[0] if LARGEST else x < best[0]
    extreme = tl.maximum(best[0], x) if LARGEST else tl.minimum(best[0], x)
    return extreme, tl.where(better, place, best[1])


@triton.jit
def _group_of(best, LARGEST: tl.constexpr, KEYS: tl.constexpr):
    """The first key of each row's first group that has the extreme."""
    extreme = tl.max(best[0], 1) if LARGEST else tl.min(best[0], 1)
    keys = best[1] + (tl.arange(0, LANES) * (KEYS // LANES))[None, :]
    return tl.min(tl.where(best[0] == extreme[:, None], keys, 2147483647), 1)


@triton.jit
def _try_key(
    leader,
    key,
    i,
    q,
    k,
    seqlen_k,
    LARGEST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """(product, key) of each row's leader, one key further: the i-th of its group."""
    raw, best_key = leader
    there = q[3] & (key < seqlen_k)
    x = inner_products(q, (k[0], k[1], key.to(tl.int64), there), HEAD_DIM, COLUMNS)
    better = there & ((i == 0) | (x > raw if LARGEST else x < raw))
    return tl.where(better, x, raw), tl.where(better, key, best_key)


@triton.jit
def first_keys(
    best,
    least,
    q,
    k,
    seqlen_k,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first keys of rows' largest and smallest scores; 0 where the rule asks for none."""
    nothing = tl.zeros_like(q[2]).to(tl.int32)
    high, low = (nothing.to(tl.float32), nothing), (nothing.to(tl.float32), nothing)
    if MODULATION == "range" or MODULATION == "max":
        group, other = _group_of(best, True, KEYS), nothing
        if MODULATION == "range":
            other = _group_of(least, False, KEYS)
        for i in range(GROUP):  # unrolled, it would take more registers than are left
            high = _try_key(high, group + i, i, q, k, seqlen_k, not NEGATE, HEAD_DIM, COLUMNS)
            if MODULATION == "range":
                low = _try_key(low, other + i, i, q, k, seqlen_k, NEGATE, HEAD_DIM, COLUMNS)
    return high[1], low[1]


@triton.jit
def store_with_extremes(
    at,
    part,
    through,
    k,
    MODULATION: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Columns of dq, with the rank-one term of the keys of a row's extremes."""
    base, stride, tokens, exist = at
    there = exist
    if len(k) > 2:  # whether there are keys
        there = exist & k[2]
    if MODULATION == "max" or MODULATION == "range":
        best = load_part(k[0], k[1], through[1].to(tl.int64), there, FIRST, PART, HEAD_DIM)
        part += through[0][:, None] * best.to(tl.float32)
    if MODULATION == "range":
        least = load_part(k[0], k[1], through[3].to(tl.int64), there, FIRST, PART, HEAD_DIM)
        part += through[2][:, None] * least.to(tl.float32)
    store_part(base, stride, tokens, exist, part, FIRST, PART, HEAD_DIM)
