"""Tiles of keys of both populations in the specialised forward kernel."""

from __future__ import annotations

import triton
import triton.language as tl

MOST = tl.constexpr(3.4e38)
# Columns of a sum of weights that the matrix unit fills, all equal. Of a thread's eight numbers the
# last reduction reads two, one a row, and the compiler drops the others.
COLUMNS = tl.constexpr(16)
NARROW_HEADS = tl.constexpr(
    64
)  # wider heads leave neither the matrix unit's time nor room for the ones
# A choice by two words in PTX: from comparisons of its own Triton 3.6 makes a vector, of its bits a
# number, and of that predicates again, 66 instructions of a warp and 64 keys.
SELECT = tl.constexpr("""{
    .reg .pred meets;
    .reg .b32 common;
    and.b32 common, $3, $4;
    setp.ne.b32 meets, common, 0;
    selp.f32 $0, $1, $2, meets;
}""")

LOAD = tl.constexpr("ld.global.nc.b32 $0, [$1];")


@triton.jit
def softmax_weights(before, row_max, scores, factor):
    """Weights of scores, those of -inf 0, and what weights before them are worth under the new
    maximum.
    """
    # Finite, so that scores of -inf weigh nothing where there are no others.
    shift = tl.minimum(-row_max * factor, MOST)
    alpha = tl.exp2(tl.fma(before, factor, shift))
    return tl.exp2(tl.fma(scores, factor[:, None], shift[:, None])), alpha


@triton.jit
def _absorb(state, scores, values, exist, factor, ENDS: tl.constexpr):
    """Online softmax over a tile of scores, the sums of weights in equal columns by the matrix unit
    or a number a row. Copies behind the last key are left out of sums alone: their values are 0.
    """
    before, sums, acc = state
    row_max = tl.maximum(before, tl.max(scores, 1))
    weights, alpha = softmax_weights(before, row_max, scores, factor)
    halves = weights.to(values.dtype)
    if len(sums.shape) == 1:
        weights = weights * tl.where(exist, 1.0, 0.0)[None, :] if ENDS else weights
        sums = sums * alpha + tl.sum(weights, 1)
    else:
        ones = tl.full([weights.shape[1], COLUMNS], 1.0, values.dtype)
        ones = tl.where(exist[:, None], ones, 0.0) if ENDS else ones
        # No sum, which would join the product: columns that nobody reads are then not scaled.
        sums = tl.fma(sums, tl.broadcast_to(alpha[:, None], sums.shape), tl.dot(halves, ones))
    acc = tl.dot(halves, values, acc * alpha[:, None])
    return row_max, sums, acc


@triton.jit
def _columns(sums, HEAD_COLUMNS: tl.constexpr):
    """Sums of rows as they are carried: in columns where heads are narrow."""
    if HEAD_COLUMNS <= NARROW_HEADS:
        sums = tl.broadcast_to(sums[:, None], [sums.shape[0], COLUMNS])
    return sums


@triton.jit
def _of_columns(sums):
    """Sums of rows from what is carried."""
    if len(sums.shape) == 2:
        read = (tl.arange(0, COLUMNS)[None, :] & 9) == 0  # one in each quarter of the left half
        sums = tl.sum(tl.where(read, sums, 0.0), 1) / 4
    return sums


@triton.jit
def _words_at(key_words, places, COMPILED: tl.constexpr):
    """Words of keys in places; the compiler, which would have those of 128 keys fetched by the
    group that fetches tiles, gives up on such a load.
    """
    if COMPILED and places.shape[0] > 64:
        words = tl.inline_asm_elementwise(LOAD, "=r,l", [key_words + places], tl.int32, True, 1)
    else:
        words = tl.load(key_words + places)
    return words


@triton.jit
def _where_met(scores, others, row_words, words, COMPILED: tl.constexpr):
    """`scores` where words of rows and of keys have a bit in common, `others` elsewhere."""
    row_words, words = row_words[:, None], words[None, :]
    if COMPILED:
        met = tl.inline_asm_elementwise(
            SELECT, "=r,r,r,r,r", [scores, others, row_words, words], tl.float32, True, 1
        )
    else:
        met = tl.where((row_words & words) != 0, scores, others)
    return met


@triton.jit
def attend_mixed(
    matched,
    others,
    rows,
    row_words,
    factor,
    source,
    key_words,
    tiles,
    count,
    seqlen_k,
    ENDS: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """States of both populations and smallest score over `count` listed tiles. Where the keys end
    within a tile, copies of the last fill it and its words, so that no score need be chosen.
    """
    keys, values, first_row = source
    BLOCK_N: tl.constexpr = keys.block_shape[0]
    in_max, in_sum, in_acc = matched
    out_max, out_sum, out_acc = others
    in_sums, out_sums = _columns(in_sum, rows.shape[1]), _columns(out_sum, rows.shape[1])
    low = tl.full([rows.shape[0]], float("inf"), tl.float32)
    # Keys are 128 ahead, one tile of 128 or two of 64.
    for place in tl.range(0, count, warp_specialize=True, num_stages=1 + 128 // BLOCK_N):
        first = tl.load(tiles + place) * BLOCK_N
        places = first + tl.arange(0, BLOCK_N)
        exist = places < seqlen_k
        words = _words_at(key_words, places, COMPILED)
        raw = tl.dot(rows, keys.load([first_row + first, 0]).T)
        inside = _where_met(raw, float("-inf"), row_words, words, COMPILED)
        outside = _where_met(float("-inf"), raw, row_words, words, COMPILED)
        low = tl.minimum(low, tl.min(raw, 1))
        own = values.load([first_row + first, 0])
        in_max, in_sums, in_acc = _absorb(
            (in_max, in_sums, in_acc), inside, own, exist, factor, ENDS
        )
        out_max, out_sums, out_acc = _absorb(
            (out_max, out_sums, out_acc), outside, own, exist, factor, ENDS
        )
    in_sum, out_sum = _of_columns(in_sums), _of_columns(out_sums)
    return (in_max, in_sum, in_acc), (out_max, out_sum, out_acc), low
