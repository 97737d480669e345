"""Layout attention backward, the pass over query tiles.

The gradient through a row's largest and smallest score is a rank-one term of two keys: this pass
adds it to dq and leaves its two factors and the keys' places, the pass over key tiles adds it where
a key is in that place. No sums are shared, so every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.bwd_q_steps import (
    beginnings,
    tile_from,
    tile_of,
    visit,
)
from dense_attn.triton_kernels.layout_attention.extremes import (
    first_keys,
    keys_of_columns,
    no_extreme,
    store_with_extremes,
)
from dense_attn.triton_kernels.layout_attention.records import (
    KEY_OF_MAX,
    KEY_OF_MIN,
    NUM_NUMBERS,
    NUM_PLACES,
    SHIFT,
    lift_of,
    load_extremes,
    load_stats,
    store_extreme,
    store_record,
)
from dense_attn.triton_kernels.layout_attention.row_sums import (
    finished_sums,
    lse_gradient,
    no_sums,
    of_some_keys,
    through_extremes,
    times_rows,
    without_missed,
)
from dense_attn.triton_kernels.layout_attention.tiles import (
    key_head_of,
    keys_of,
    listed_tiles,
    tile_at,
)
from dense_attn.triton_kernels.primitives import (
    LOG2_E,
    head_of,
    inner_products,
    load_head,
    load_numbers,
    row_stride,
    scale_rows,
    temperature,
    tile_of_program,
    tokens_at,
    tokens_of,
    words_at,
    zero_rows,
)

COLUMNS = tl.constexpr(16)  # of rows at a time, to spare registers


@triton.jit
def _delta(
    grad_out,
    out,
    grad_lse,
    batch,
    head,
    tokens,
    exist,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Rows' products of the output and its gradient, less the gradient of lse."""
    grad_rows = (head_of(grad_out, batch, head), row_stride(grad_out), tokens, exist)
    out_rows = (head_of(out, batch, head), row_stride(out), tokens, exist)
    products = inner_products(grad_rows, out_rows, HEAD_DIM, COLUMNS)
    return products - lse_gradient(grad_lse, batch, head, tokens, exist, BLOCK_M)


@triton.jit
def _tokens_of_tile(tile, source, BLOCK_N: tl.constexpr):
    """The tokens of a tile of keys by its columns, and which of them exist."""
    return tokens_of(tile * BLOCK_N + keys_of_columns(BLOCK_N), source[3], source[4], source[6])


@triton.jit
def _tokens_again(tile, order, batch, seqlen_q, PART_1: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tokens of a tile of rows as `tokens_at` has them; of one part the condition in other
    words, since the compiler keeps the first one's in predicates, of which the loop is short.
    """
    tokens, exist = tokens_at(tile * BLOCK_M, order, batch, seqlen_q, BLOCK_M)
    if PART_1 == 0:
        exist = seqlen_q - tile * BLOCK_M - tl.arange(0, BLOCK_M) > 0
    return tokens, exist


@triton.jit
def _visit_all(
    state,
    query,
    numbers,
    source,
    tiles,
    listed,
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
    """Every listed tile of keys; the one that they end in after the others, in code of its own."""
    listed, num_whole, count = listed
    seqlen_k, ORDERED = source[6], source[3] is not None
    key_tiles = tl.cdiv(source[7], BLOCK_N)  # of which a list has room
    # Few rows, and those of float32, stay in registers, which such code would hold twice.
    TAILS: tl.constexpr = source[0][0].dtype.element_ty == tl.float32 or BLOCK_M < 64
    # Without a list tiles follow each other, and so do the rows that they are loaded from; AMD's
    # wide tiles of wide rows, and two parts of a size, have no registers for where those begin.
    FITS: tl.constexpr = not TAILS and PART_1 < PART_0 and (PART_0 < 128 or BLOCK_N < 64)
    STEADY: tl.constexpr = tiles is None and source[3] is None and FITS
    tails = (
        0 if TAILS else tl.cdiv(seqlen_k, BLOCK_N) - seqlen_k // BLOCK_N
    )  # 0 or 1: every list ends in it
    tile = tl.where(count > 0, tile_at(listed, key_tiles, 0, num_whole, tiles), 0)
    soon = tile_at(listed, key_tiles, tl.minimum(1, tl.maximum(count - 1, 0)), num_whole, tiles)
    tokens, there = _tokens_of_tile(tile, source, BLOCK_N)
    columns = keys_of_columns(BLOCK_N)
    begin = beginnings(source, columns)
    for place in range(count - tails):
        first = tile * BLOCK_N
        # Tokens of an order are known a tile ahead and tiles two: no copy waits for its own place.
        if STEADY:
            exist = first + columns < seqlen_k
            here = tile_from(source, begin, first)
            tile += 1  # not `place`, of which the compiler makes one of 64 bits
        elif ORDERED:
            here, exist = tile_of(source, tokens), there
            tile = soon
            tokens, there = _tokens_of_tile(tile, source, BLOCK_N)
            soon = tile_at(listed, key_tiles, tl.minimum(place + 2, count - 1), num_whole, tiles)
        else:
            tokens, exist = _tokens_of_tile(tile, source, BLOCK_N)
            here = tile_of(source, tokens)
            tile = tile_at(listed, key_tiles, tl.minimum(place + 1, count - 1), num_whole, tiles)
        state = visit(
            state,
            query,
            numbers,
            here,
            exist,
            first,
            TAILS,
            MODULATION,
            NEGATE,
            AHEAD,
            PRECISION,
            HEAD_DIM,
            PART_0,
            PART_1,
            BLOCK_M,
            BLOCK_N,
        )
    if tails > 0:
        first = seqlen_k // BLOCK_N * BLOCK_N
        tokens, exist = _tokens_of_tile(seqlen_k // BLOCK_N, source, BLOCK_N)
        here = tile_of(source, tokens)
        if STEADY:
            here = tile_from(source, begin, first)
        state = visit(
            state,
            query,
            numbers,
            here,
            exist,
            first,
            True,
            MODULATION,
            NEGATE,
            AHEAD,
            PRECISION,
            HEAD_DIM,
            PART_0,
            PART_1,
            BLOCK_M,
            BLOCK_N,
        )
    return state


@triton.jit
def layout_attention_bwd_q_kernel(
    grad_out,
    grad_lse,
    q,
    k,
    v,
    q_words,
    k_words,
    q_order,
    k_order,
    strength,  # (pointer, strides)
    out,
    stats_ptr,
    tiles,
    counts,
    dq,
    dstrength_ptr,
    # [heads, NUMBERS, rows] what the pass over keys needs, int32 [heads, PLACES, rows]
    numbers_ptr,
    places_ptr,
    num_heads,
    seqlen_q,
    seqlen_k,
    sm_scale,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr = 1,
    seqlens=None,
):
    """One tile of query rows against all keys: dq, dstrength, and what the pass over keys needs of
    each row.
    """
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    index, tile, batch, head = tile_of_program(num_heads, seqlen_q, BLOCK_M)
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    shift = _delta(grad_out, out, grad_lse, batch, head, tokens, exist, HEAD_DIM, BLOCK_M)
    rows = load_head(q, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    grads = load_head(grad_out, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    row_words = words_at(q_words, batch, tokens, exist)
    c = load_numbers(strength, batch, head, tokens, exist)
    tau = temperature(c, MODULATION) * sm_scale
    row = index * seqlen_q + tokens
    high, low, anchor, add_in, add_out = load_stats(
        stats_ptr, row, exist, tau * LOG2_E, MODULATION, EXACT
    )
    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)  # records are in the order of visits
    record = numbers_ptr + index * NUM_NUMBERS * seqlen_q + places
    known = tau * LOG2_E, add_in, add_out, anchor, row_words
    store_record(record, seqlen_q, exist, known, lift_of(sm_scale, q[0].dtype.element_ty), EXACT)
    own, most_keys = key_head_of(head, GROUP), seqlen_k
    seqlen_k = keys_of(seqlens, batch, seqlen_k)
    acc, sums = zero_rows(BLOCK_M, PART_0, PART_1), no_sums(BLOCK_M, EXACT)
    mean = zero_rows(BLOCK_M, PART_0, PART_1)  # of keys by weight, where sums are exact
    state = acc, mean, sums, no_extreme(BLOCK_M, True), no_extreme(BLOCK_M, False)
    query = rows, grads, row_words
    source = k, v, k_words, k_order, batch, own, seqlen_k, most_keys
    numbers = tau * LOG2_E, anchor, add_in, add_out, shift, high, low
    reach = most_keys if tiles is not None else seqlen_k
    listed = listed_tiles(tiles, counts, batch, tile, tl.cdiv(reach, BLOCK_N))
    acc, mean, sums, best, least = _visit_all(
        state,
        query,
        numbers,
        source,
        tiles,
        listed,
        MODULATION,
        NEGATE,
        AHEAD,
        PRECISION,
        HEAD_DIM,
        PART_0,
        PART_1,
        BLOCK_M,
        BLOCK_N,
    )
    # Read again, so that the loop need not carry them.
    tokens, exist = _tokens_again(tile, q_order, batch, seqlen_q, PART_1, BLOCK_M)
    row = index * seqlen_q + tokens
    c = load_numbers(strength, batch, head, tokens, exist)
    through_lse = lse_gradient(grad_lse, batch, head, tokens, exist, BLOCK_M)
    queries = (head_of(q, batch, head), row_stride(q), tokens, exist)
    through_lse = of_some_keys(through_lse, seqlens, seqlen_k)
    grad_in, grad_distance, missed = finished_sums(sums, through_lse, MODULATION, EXACT)
    acc = without_missed(acc, mean, missed, PART_1, EXACT and PRECISION == "ieee")
    shift += missed
    high, low = load_extremes(stats_ptr, row, exist)
    high, low = of_some_keys(high, seqlens, seqlen_k), of_some_keys(low, seqlens, seqlen_k)
    if MODULATION == "range" and not EXACT:  # dq is the sum of ds' times keys: the rest is its own
        grad_raw = times_rows(acc, queries, PART_0, PART_1, HEAD_DIM)
        grad_distance = high * grad_in + low * (through_lse - grad_in)
        grad_distance += grad_raw if NEGATE else -grad_raw
    keys = head_of(k, batch, own), row_stride(k)
    signed_scale = -sm_scale if NEGATE else sm_scale
    best_key, least_key = first_keys(
        best, least, queries, keys, seqlen_k, MODULATION, NEGATE, BLOCK_N, HEAD_DIM, COLUMNS
    )
    acc = scale_rows(acc, temperature(c, MODULATION) * signed_scale, PART_1)
    places = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    record = numbers_ptr + index * NUM_NUMBERS * seqlen_q + places
    pair = places_ptr + index * NUM_PLACES * seqlen_q + places
    shift *= -(temperature(c, MODULATION) * sm_scale * LOG2_E)
    tl.store(record + SHIFT * seqlen_q, shift, mask=exist)
    grads = grad_in, grad_distance, through_lse
    grad_strength, through_max, through_min = through_extremes(c, high, grads, sm_scale, MODULATION)
    if MODULATION == "max" or MODULATION == "range":
        store_extreme(record, pair, KEY_OF_MAX, seqlen_q, exist, through_max, best_key)
    if MODULATION == "range":
        store_extreme(record, pair, KEY_OF_MIN, seqlen_q, exist, through_min, least_key)
    tl.store(dstrength_ptr + row, grad_strength, mask=exist)
    through = (signed_scale * through_max, best_key, signed_scale * through_min, least_key)
    at = (head_of(dq, batch, head), row_stride(dq), tokens, exist)
    keys = (keys[0], keys[1], of_some_keys(exist, seqlens, seqlen_k))
    store_with_extremes(at, acc[0], through, keys, MODULATION, 0, PART_0, HEAD_DIM)
    if PART_1 > 0:  # after the first, so that the rows of one part at a time are held
        store_with_extremes(at, acc[1], through, keys, MODULATION, PART_0, PART_1, HEAD_DIM)
