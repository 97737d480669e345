"""A tile of keys in the backward pass over query tiles: scores, ds' and what is summed of them."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.extremes import add_extremes, by_columns, by_lanes
from dense_attn.triton_kernels.layout_attention.records import weights_of
from dense_attn.triton_kernels.layout_attention.row_sums import add_matched, add_sums
from dense_attn.triton_kernels.layout_attention.tiles import add_tokens, grains_of
from dense_attn.triton_kernels.primitives import (
    head_of,
    load_rows,
    products,
    row_stride,
)


@triton.jit
def _rows(x, SPREAD: tl.constexpr):
    """Numbers of rows beside a tile of scores."""
    return x[:, None, None] if SPREAD else x[:, None]


@triton.jit
def _spread(x, ROWS: tl.constexpr, KEYS: tl.constexpr, SPREAD: tl.constexpr):
    """x [rows, keys] by lanes, where it is to be."""
    return by_lanes(x, ROWS, KEYS) if SPREAD else x


@triton.jit
def _weigh(sums, raw, slope, words, of_rows):
    """(a lane's sums of matched keys' ds' [rows, lanes], ds') from scores and the weights'
    gradients, both [rows, lanes, keys of a lane]; one key after the other, so that a condition
    lives from the select to the sum under it and words are compared once.
    """
    KEYS: tl.constexpr = raw.shape[2]
    if KEYS == 1:
        factor, add_in, add_out, shift, row_words = of_rows  # [rows, 1, 1]
        meets = (row_words & words) != 0
        weights = weights_of(raw, factor, None, tl.where(meets, add_in, add_out), False)
        slope -= shift
        grad = weights * slope
        sums = add_matched(sums, weights, slope, meets)
    else:
        LANES: tl.constexpr = raw.shape[1]
        halves: tl.constexpr = [raw.shape[0], LANES, KEYS // 2, 2]
        even, odd = tl.split(tl.reshape(raw, halves))
        even_slope, odd_slope = tl.split(tl.reshape(slope, halves))
        even_words, odd_words = tl.split(tl.reshape(words, [1, LANES, KEYS // 2, 2]))
        sums, even = _weigh(sums, even, even_slope, even_words, of_rows)
        sums, odd = _weigh(sums, odd, odd_slope, odd_words, of_rows)
        grad = tl.reshape(tl.join(even, odd), raw.shape)
    return sums, grad


@triton.jit
def visit(
    state,
    query,
    numbers,
    source,
    exist,
    first,
    TAIL: tl.constexpr,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile further, of keys, values, words, and which exist; only a TAIL may lack some."""
    acc, mean, sums, best, least = state
    rows, grads, row_words = query
    factor, anchor, add_in, add_out, shift, high, low = numbers
    keys, values, words = source
    EXACT: tl.constexpr = keys[0].dtype.element_ty == tl.float32
    # Many scores are [rows, lanes, keys of a lane]: sums of those under a condition need no select.
    SPREAD: tl.constexpr = BLOCK_N >= 64 and not EXACT
    # Of two parts, or without extremes, code of one key after the other is longer by the count.
    WEIGHS: tl.constexpr = SPREAD and PART_1 == 0 and (MODULATION == "range" or MODULATION == "max")
    if not TAIL:
        exist = tl.full([BLOCK_N], True, tl.int1)
    columns = load_rows(*keys, exist, PART_0, PART_1, HEAD_DIM)
    values = load_rows(*values, exist, PART_0, PART_1, HEAD_DIM)
    words = tl.load(words, mask=exist, other=0)
    row_words, words = _rows(row_words, SPREAD), _spread(words[None, :], 1, BLOCK_N, SPREAD)
    there = _spread(exist[None, :], 1, BLOCK_N, SPREAD)
    raw = _spread(products(rows, columns, PART_1, PRECISION), BLOCK_M, BLOCK_N, SPREAD)
    slope = _spread(products(grads, values, PART_1, PRECISION), BLOCK_M, BLOCK_N, SPREAD)
    raw = -raw if NEGATE else raw
    if MODULATION == "range" or MODULATION == "max":
        x = tl.where(there, raw, float("-inf")) if TAIL else raw
        best = add_extremes(best, _spread(x, BLOCK_M, BLOCK_N, not SPREAD), first, True)
    if MODULATION == "range":
        x = tl.where(there, raw, float("inf")) if TAIL else raw
        least = add_extremes(least, _spread(x, BLOCK_M, BLOCK_N, not SPREAD), first, False)
    factor, shift = _rows(factor, SPREAD), _rows(shift, SPREAD)
    add_in, add_out = _rows(add_in, SPREAD), _rows(add_out, SPREAD)
    if WEIGHS:
        of_rows = factor, add_in, add_out, shift, row_words
        sums, grad = _weigh(sums, raw, slope, words, of_rows)
        grad = tl.where(there, grad, 0.0) if TAIL else grad  # keys that are not meet no row
    else:
        meets = (row_words & words) != 0
        offsets = tl.where(meets, add_in, add_out)
        weights = weights_of(raw, factor, _rows(anchor, SPREAD), offsets, EXACT)
        if MODULATION == "mask":
            weights = tl.where(meets, weights, 0.0)
        elif TAIL:
            weights = tl.where(there, weights, 0.0)
        slope -= shift
        grad = weights * slope  # ds'
        distance = raw
        if EXACT:
            distance = tl.where(meets, high[:, None], low[:, None]) - raw
        if SPREAD and MODULATION != "mask":
            sums = add_matched(sums, weights, slope, meets)
        else:
            sums = add_sums(
                sums, grad, weights, distance, meets, MODULATION, EXACT, BLOCK_M, BLOCK_N
            )
    grad = by_columns(grad, BLOCK_M, BLOCK_N) if SPREAD else grad
    source = columns, keys, exist
    acc = add_tokens(acc, grad, source, PART_0, PART_1, HEAD_DIM, PRECISION, AHEAD)
    if EXACT and PRECISION == "ieee":
        first, second = tl.dot(weights, columns[0], mean[0], input_precision="ieee"), mean[1]
        if PART_1 > 0:
            second = tl.dot(weights, columns[1], second, input_precision="ieee")
        mean = first, second
    return acc, mean, sums, best, least


@triton.jit
def tile_of(source, tokens):
    """Keys, values and words of tokens."""
    k, v, words, _, batch, head = source[:6]
    keys = head_of(k, batch, head), row_stride(k), tokens
    values = head_of(v, batch, head), row_stride(v), tokens
    return keys, values, words[0] + batch * words[1] + tokens * words[2]


@triton.jit
def beginnings(source, columns):
    """Where keys, values and words of the first tile begin, by its columns."""
    k, v, words, _, batch, head = source[:6]
    columns = columns.to(tl.int64)
    keys = batch * k[1] + head * k[2] + columns * k[3]
    values = batch * v[1] + head * v[2] + columns * v[3]
    return keys, values, batch * words[1] + columns * words[2]


@triton.jit
def tile_from(source, begin, first):
    """Keys, values and words of the tile from the key `first` on: all lanes go on by one number."""
    k, v, words = source[:3]
    keys = k[0] + grains_of(k, first) * k[4], k[4], begin[0]
    values = v[0] + grains_of(v, first) * v[4], v[4], begin[1]
    at = words[0] + tl.cast(first, tl.uint32).to(tl.int64) * words[2]
    return keys, values, at + begin[2]
