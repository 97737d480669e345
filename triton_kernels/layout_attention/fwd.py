"""Layout attention forward: tiles of keys in two phases, one a population.

Scores stay raw, as <q, k>, until they meet exp2: `factor` carries the temperature, the scale and
log2(e). A state's anchor is the raw score that weighs most in it: the largest, or the smallest
under a negative temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.records import store_stats
from dense_attn.triton_kernels.primitives import (
    LN_2,
    LOG2_E,
    add_product,
    additions,
    anchor_of,
    head_of,
    load_head,
    load_numbers,
    load_part,
    load_rows,
    products,
    row_stride,
    scale_rows,
    store_part,
    store_rows,
    temperature,
    tile_in_turn,
    tokens_at,
    words_at,
    zero_rows,
)


@triton.jit
def _attend_to_all(
    state,
    query,
    source,
    whole,
    num_whole,
    listed,
    key_tiles,
    num_mixed,
    IN: tl.constexpr,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over all keys of one population: tiles that are wholly of it, then those in
    doubt.
    """
    state = _attend(
        state,
        query,
        source,
        whole,
        num_whole,
        IN,
        False,
        MODULATION,
        NEGATE,
        PART_0,
        PART_1,
        HEAD_DIM,
        BLOCK_N,
        PRECISION,
    )
    return _attend(
        state,
        query,
        source,
        listed + key_tiles,
        num_mixed,
        IN,
        True,
        MODULATION,
        NEGATE,
        PART_0,
        PART_1,
        HEAD_DIM,
        BLOCK_N,
        PRECISION,
    )


@triton.jit
def _attend(
    state,
    query,
    source,
    tiles,
    count,
    IN: tl.constexpr,
    TESTED: tl.constexpr,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the keys of one population in `count` listed tiles; every pair of
    untested tiles is of it.
    """
    row_max, row_min, row_sum, acc = state
    q, q_words, factor = query
    k, v, k_words, k_order, batch, seqlen_k = source
    for place in range(count):
        first = tl.load(tiles + place) * BLOCK_N
        tokens, exist = tokens_at(first, k_order, batch, seqlen_k, BLOCK_N)
        words = None
        if TESTED:
            words = tl.load(k_words + first + tl.arange(0, BLOCK_N), mask=exist, other=0)
        else:  # a tile that the keys end in is tested
            exist = tl.full([BLOCK_N], True, tl.int1)
        columns = load_rows(k[0], k[1], tokens, exist, PART_0, PART_1, HEAD_DIM)
        raw = products(q, columns, PART_1, PRECISION)
        raw = -raw if NEGATE else raw
        high, low = raw, raw
        if TESTED:
            meets = (q_words[:, None] & words[None, :]) != 0
            inside = (meets == IN) & exist[None, :]
            high, low = tl.where(inside, raw, float("-inf")), tl.where(inside, raw, float("inf"))
        before = anchor_of(row_max, row_min, factor, MODULATION)
        row_max = tl.maximum(row_max, tl.max(high, 1))
        if MODULATION == "range":
            row_min = tl.minimum(row_min, tl.min(low, 1))
        anchor = anchor_of(row_max, row_min, factor, MODULATION)
        alpha = tl.where(row_sum == 0, 0.0, tl.exp2((before - anchor) * factor))
        weights = _weights(raw, anchor, factor, k[0].dtype.element_ty == tl.float32)
        if TESTED:
            weights = tl.where(inside, weights, 0.0)
        row_sum = row_sum * alpha + tl.sum(weights, 1)
        values = load_rows(v[0], v[1], tokens, exist, PART_0, PART_1, HEAD_DIM)
        acc = scale_rows(acc, alpha, PART_1)
        acc = add_product(acc, weights.to(values[0].dtype), values, PART_1, PRECISION)
    return row_max, row_min, row_sum, acc


@triton.jit
def _weights(raw, anchor, factor, EXACT: tl.constexpr):
    """exp2((raw - anchor)*factor); one fused multiply-add a score unless the difference must not be
    rounded late.
    """
    if EXACT:
        exponents = (raw - anchor[:, None]) * factor[:, None]
    else:
        exponents = tl.fma(raw, factor[:, None], (-anchor * factor)[:, None])
    return tl.exp2(exponents)


@triton.jit
def layout_attention_fwd_kernel(
    q,
    k,
    v,
    q_words,
    q_order,
    k_order,
    strength,  # (pointer, strides)
    # [B|1, query tiles, 2, key tiles], [B|1, query tiles, 3], [B|1, keys]: `TileLists`
    tiles,
    counts,
    visited,
    out,
    lse_ptr,
    stats_ptr,
    # float32 [B, H, M, PART_0 + PART_1] where the first phase's accumulator waits, or None
    parked_ptr,
    num_heads,
    seqlen_q,
    seqlen_k,
    sm_scale,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of query rows: phase IN over matched keys, phase OUT over the others, and the merge
    of both states.
    """
    WIDTH: tl.constexpr = HEAD_DIM * k[0].dtype.element_ty.primitive_bitwidth // 8
    index, tile, batch, head = tile_in_turn(num_heads, seqlen_q, seqlen_k, WIDTH, BLOCK_M)
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    rows = load_head(q, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    row_words = words_at(q_words, batch, tokens, exist)
    c = load_numbers(strength, batch, head, tokens, exist)
    factor = temperature(c, MODULATION) * sm_scale * LOG2_E
    keys = (head_of(k, batch, head), row_stride(k))
    values = (head_of(v, batch, head), row_stride(v))
    key_tiles = tl.cdiv(seqlen_k, BLOCK_N)
    listed = tiles[0] + batch * tiles[1] + tile * tl.cast(2 * key_tiles, tl.int64)
    key_words = visited[0] + batch * visited[1]
    count_at = counts[0] + batch * counts[1] + tile * 3
    num_in, num_mixed, num_out = tl.load(count_at), tl.load(count_at + 1), tl.load(count_at + 2)

    least = tl.full([BLOCK_M], float("-inf"), tl.float32)
    empty = (least, -least, tl.zeros([BLOCK_M], tl.float32), zero_rows(BLOCK_M, PART_0, PART_1))
    query = (rows, row_words, factor)
    source = (keys, values, key_words, k_order, batch, seqlen_k)
    in_max, in_min, in_sum, in_acc = _attend_to_all(
        empty,
        query,
        source,
        listed,
        num_in,
        listed,
        key_tiles,
        num_mixed,
        True,
        MODULATION,
        NEGATE,
        PART_0,
        PART_1,
        HEAD_DIM,
        BLOCK_N,
        PRECISION,
    )
    parked = index * seqlen_q + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    PARKED: tl.constexpr = PART_0 + PART_1
    if parked_ptr is not None:
        store_rows(parked_ptr, PARKED, parked, exist, in_acc, PART_0, PART_1, PARKED)
    others = empty
    if MODULATION != "mask":
        others = _attend_to_all(
            others,
            query,
            source,
            listed + key_tiles - num_out,
            num_out,
            listed,
            key_tiles,
            num_mixed,
            False,
            MODULATION,
            NEGATE,
            PART_0,
            PART_1,
            HEAD_DIM,
            BLOCK_N,
            PRECISION,
        )
    # Read again, so that the loops need not carry them; one part after the other, so that one at a
    # time is held.
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    c = load_numbers(strength, batch, head, tokens, exist)
    matched = (in_max, in_min, in_sum)
    share_in, share_out, lse, stats = _shares(matched, others, c, sm_scale, MODULATION)
    store_stats(lse, stats, lse_ptr, stats_ptr, index * seqlen_q + tokens, exist)
    share_in, share_out = share_in[:, None], share_out[:, None]
    first, second = in_acc
    if parked_ptr is not None:
        tl.debug_barrier()  # what one thread has parked another may fetch
        first = load_part(parked_ptr, PARKED, parked, exist, 0, PART_0, PARKED)
    first = first * share_in + others[3][0] * share_out
    base, stride = head_of(out, batch, head), row_stride(out)
    store_part(base, stride, tokens, exist, first, 0, PART_0, HEAD_DIM)
    if PART_1 > 0:
        if parked_ptr is not None:
            second = load_part(parked_ptr, PARKED, parked, exist, PART_0, PART_1, PARKED)
        second = second * share_in + others[3][1] * share_out
        store_part(base, stride, tokens, exist, second, PART_0, PART_1, HEAD_DIM)


@triton.jit
def _shares(matched, others, c, sm_scale, MODULATION: tl.constexpr):
    """Shares of both states in the row, in the log domain, now that its extremes are known; lse and
    stats.
    """
    in_max, in_min, in_sum = matched
    out_max, out_min, out_sum, _ = others
    tau = temperature(c, MODULATION) * sm_scale
    factor = tau * LOG2_E
    row_max, row_min = tl.maximum(in_max, out_max), tl.minimum(in_min, out_min)
    add_in, add_out, common = additions(c, sm_scale * row_max, sm_scale * row_min, MODULATION)
    in_anchor = anchor_of(in_max, in_min, factor, MODULATION)
    out_anchor = anchor_of(out_max, out_min, factor, MODULATION)
    # Of the matched keys' heaviest.
    lead = (in_anchor - out_anchor) * factor + (add_in - add_out) * LOG2_E
    below_in = tl.where(out_sum == 0, 0.0, tl.where(lead >= 0, 0.0, lead))
    below_out = tl.where(in_sum == 0, add_out, tl.where(lead <= 0, 0.0, -lead))
    weight_in = tl.where(in_sum == 0, 0.0, tl.exp2(below_in))
    weight_out = tl.where(out_sum == 0, 0.0, tl.exp2(below_out))

    row_sum = in_sum * weight_in + out_sum * weight_out
    inverse = tl.where(row_sum == 0, 0.0, 1 / row_sum)
    heaviest = tl.where((in_sum != 0) & (below_in >= 0), in_anchor * tau + add_in, out_anchor * tau)
    log_sum = tl.log2(row_sum)
    lse = tl.where(row_sum == 0, float("-inf"), heaviest + log_sum * LN_2 + common)
    anchor = anchor_of(row_max, row_min, factor, MODULATION)
    offset_in = (anchor - in_anchor) * factor + below_in - log_sum
    offset_in = tl.where(in_sum == 0, float("-inf"), offset_in)
    offset_out = (anchor - out_anchor) * factor + below_out - log_sum
    offset_out = tl.where(out_sum == 0, float("-inf"), offset_out)
    return weight_in * inverse, weight_out * inverse, lse, (row_max, row_min, offset_in, offset_out)
