"""The first key with a row's largest or smallest score, by two instructions a score.

In the loop a lane keeps the extreme of its own scores and the group of keys that has it; which of
the group's keys it is, their products tell again behind the loop.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import load_part, sum_of

# Columns of a tile that a lane of NVIDIA's matrix units holds: two of each eight, which four lanes
# share.
LANES = tl.constexpr(4)
GROUP = tl.constexpr(4)  # keys among which one that has a row's extreme is sought behind the loop


@triton.jit
def by_lane(x, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """x [rows, keys] as [rows, groups, 2, lanes, 2]: no lane shares an axis but the lanes'."""
    return tl.reshape(x, [ROWS, KEYS // 16, 2, LANES, 2])


@triton.jit
def keys_of_columns(KEYS: tl.constexpr):
    """The key that each column of a tile has: neighbours go to one lane, so that the order of keys
    is that of lanes, groups and columns.
    """
    column = tl.arange(0, KEYS)
    return column // 2 % LANES * (KEYS // LANES) + column // 8 * 2 + column % 2


@triton.jit
def add_extremes(best, raw, first, LARGEST: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Each lane's running extreme of raw scores and the place of the first group that has it."""
    x = by_lane(raw, ROWS, KEYS)
    x = tl.max(tl.max(x, 4), 2) if LARGEST else tl.min(tl.min(x, 4), 2)  # [rows, groups, lanes]
    x = tl.permute(x, (0, 2, 1))
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
def _first_key(
    group,
    q,
    k,
    seqlen_k,
    tokens,
    exist,
    LARGEST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first key of each row's group that has the group's extreme."""
    best_key = group
    best = tl.zeros_like(group).to(tl.float32)
    for i in tl.static_range(GROUP):
        key = group + i
        there = exist & (key < seqlen_k)
        raw = tl.zeros_like(best)
        for first in tl.static_range(0, HEAD_DIM, COLUMNS):
            x = load_part(q[0], q[1], tokens, exist, first, COLUMNS, HEAD_DIM).to(tl.float32)
            y = load_part(k[0], k[1], key.to(tl.int64), there, first, COLUMNS, HEAD_DIM)
            raw += sum_of(x * y, exist[:, None], True)
        if i == 0:
            best = raw
        else:
            better = there & (raw > best if LARGEST else raw < best)
            best, best_key = tl.where(better, raw, best), tl.where(better, key, best_key)
    return best_key


@triton.jit
def first_keys(
    best,
    least,
    q,
    k,
    seqlen_k,
    tokens,
    exist,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first keys of rows' largest and smallest scores; 0 where the rule asks for none."""
    best_key = tl.zeros_like(tokens).to(tl.int32)
    least_key = best_key
    if MODULATION == "range" or MODULATION == "max":
        group = _group_of(best, True, KEYS)
        best_key = _first_key(group, q, k, seqlen_k, tokens, exist, not NEGATE, HEAD_DIM, COLUMNS)
    if MODULATION == "range":
        group = _group_of(least, False, KEYS)
        least_key = _first_key(group, q, k, seqlen_k, tokens, exist, NEGATE, HEAD_DIM, COLUMNS)
    return best_key, least_key
