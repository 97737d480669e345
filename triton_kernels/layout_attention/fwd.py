"""Layout attention forward: tiles of keys in two phases, one a population, or the whole row of
scores at once.

Scores stay raw, as <q, k>, until they meet exp2: `factor` carries the temperature, the scale and
log2(e). A state's anchor is the raw score that weighs most in it: the largest, or the smallest
under a negative temperature.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import (
    LN_2,
    LOG2_E,
    add_product,
    additions,
    anchor_of,
    finite_or_zero,
    head_of,
    load_part,
    load_rows,
    products,
    row_stride,
    scale_rows,
    store_part,
    store_rows,
    temperature,
    tokens_at,
    words_at,
    zero_rows,
)


@triton.jit
def _attend(
    state, q, q_words, factor, k, v, k_words, k_order, batch, seqlen_k, tiles, count,
    IN: tl.constexpr, TESTED: tl.constexpr, MODULATION: tl.constexpr, NEGATE: tl.constexpr,
    PART_0: tl.constexpr, PART_1: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the keys of one population in `count` listed tiles; every pair of
    untested tiles is of it.
    """
    row_max, row_min, row_sum, acc = state
    for place in range(count):
        first = tl.load(tiles + place) * BLOCK_N
        tokens, exist = tokens_at(first, k_order, batch, seqlen_k, BLOCK_N)
        words = (
            tl.load(k_words + first + tl.arange(0, BLOCK_N), mask=exist, other=0)
            if TESTED
            else None
        )
        exist = (
            exist if TESTED else tl.full([BLOCK_N], True, tl.int1)
        )  # a tile that the keys end in is tested
        raw = products(
            q, load_rows(k[0], k[1], tokens, exist, PART_0, PART_1, HEAD_DIM), PART_1, PRECISION
        )
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
        acc = add_product(
            scale_rows(acc, alpha, PART_1), weights.to(values[0].dtype), values, PART_1, PRECISION
        )
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
    q, k, v, q_words, q_order, k_order, strength,  # (pointer, strides)
    # [B|1, query tiles, 2, key tiles], [B|1, query tiles, 3], [B|1, keys]: `TileLists`
    tiles, counts, visited,
    out, lse_ptr, stats_ptr,
    # float32 [B, H, M, PART_0 + PART_1] where the first phase's accumulator waits, or None
    parked_ptr,
    num_heads, seqlen_q, seqlen_k, sm_scale,
    MODULATION: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of query rows: phase IN over matched keys, phase OUT over the others, and the merge
    of both states.
    """
    tiles_per_head = tl.cdiv(seqlen_q, BLOCK_M)
    index = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    tile = tl.program_id(0) % tiles_per_head
    batch, head = index // num_heads, index % num_heads
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    rows = load_rows(
        head_of(q, batch, head), row_stride(q), tokens, exist, PART_0, PART_1, HEAD_DIM
    )
    row_words = words_at(q_words, batch, tokens, exist)
    c = tl.load(
        head_of(strength, batch, head) + tokens * row_stride(strength), mask=exist, other=0.0
    )
    factor = temperature(c, MODULATION) * sm_scale * LOG2_E
    keys, values = (
        (head_of(k, batch, head), row_stride(k)),
        (head_of(v, batch, head), row_stride(v)),
    )
    key_tiles = tl.cdiv(seqlen_k, BLOCK_N)
    listed = tiles[0] + batch * tiles[1] + tile * tl.cast(2 * key_tiles, tl.int64)
    key_words = visited[0] + batch * visited[1]
    count_at = counts[0] + batch * counts[1] + tile * 3
    num_in, num_mixed, num_out = tl.load(count_at), tl.load(count_at + 1), tl.load(count_at + 2)

    least = tl.full([BLOCK_M], float("-inf"), tl.float32)
    empty = (least, -least, tl.zeros([BLOCK_M], tl.float32), zero_rows(BLOCK_M, PART_0, PART_1))
    matched = _attend(
        empty, rows, row_words, factor, keys, values, key_words, k_order, batch, seqlen_k, listed, num_in,
        True, False, MODULATION, NEGATE, PART_0, PART_1, HEAD_DIM, BLOCK_N, PRECISION,
    )  # fmt: skip
    matched = _attend(
        matched, rows, row_words, factor, keys, values, key_words, k_order, batch, seqlen_k, listed + key_tiles,
        num_mixed, True, True, MODULATION, NEGATE, PART_0, PART_1, HEAD_DIM, BLOCK_N, PRECISION,
    )  # fmt: skip
    in_max, in_min, in_sum, in_acc = matched
    parked = index * seqlen_q + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if parked_ptr is not None:
        store_rows(
            parked_ptr, PART_0 + PART_1, parked, exist, in_acc, PART_0, PART_1, PART_0 + PART_1
        )
    others = empty
    if MODULATION != "mask":
        others = _attend(
            others, rows, row_words, factor, keys, values, key_words, k_order, batch, seqlen_k,
            listed + key_tiles - num_out, num_out,
            False, False, MODULATION, NEGATE, PART_0, PART_1, HEAD_DIM, BLOCK_N, PRECISION,
        )  # fmt: skip
        others = _attend(
            others, rows, row_words, factor, keys, values, key_words, k_order, batch, seqlen_k, listed + key_tiles,
            num_mixed, False, True, MODULATION, NEGATE, PART_0, PART_1, HEAD_DIM, BLOCK_N, PRECISION,
        )  # fmt: skip
    # Read again, so that the loops need not carry them; one part after the other, so that one at a
    # time is held.
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    c = tl.load(
        head_of(strength, batch, head) + tokens * row_stride(strength), mask=exist, other=0.0
    )
    share_in, share_out, lse, stats = _shares(
        (in_max, in_min, in_sum), others, c, sm_scale, MODULATION
    )
    _store_numbers(lse, stats, lse_ptr, stats_ptr, index * seqlen_q + tokens, exist)
    share_in, share_out = share_in[:, None], share_out[:, None]
    first, second = in_acc
    if parked_ptr is not None:
        tl.debug_barrier()  # what one thread has parked another may fetch
        first = load_part(parked_ptr, PART_0 + PART_1, parked, exist, 0, PART_0, PART_0 + PART_1)
    first = first * share_in + others[3][0] * share_out
    store_part(
        head_of(out, batch, head), row_stride(out), tokens, exist, first, 0, PART_0, HEAD_DIM
    )
    if PART_1 > 0:
        if parked_ptr is not None:
            second = load_part(
                parked_ptr, PART_0 + PART_1, parked, exist, PART_0, PART_1, PART_0 + PART_1
            )
        second = second * share_in + others[3][1] * share_out
        store_part(
            head_of(out, batch, head),
            row_stride(out),
            tokens,
            exist,
            second,
            PART_0,
            PART_1,
            HEAD_DIM,
        )


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
    lead = (in_anchor - out_anchor) * factor + (
        add_in - add_out
    ) * LOG2_E  # of the matched keys' heaviest
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
    offset_in = tl.where(
        in_sum == 0, float("-inf"), (anchor - in_anchor) * factor + below_in - log_sum
    )
    offset_out = tl.where(
        out_sum == 0, float("-inf"), (anchor - out_anchor) * factor + below_out - log_sum
    )
    return weight_in * inverse, weight_out * inverse, lse, (row_max, row_min, offset_in, offset_out)


@triton.jit
def _store_numbers(lse, stats, lse_ptr, stats_ptr, row, exist):
    """Lse and what the backward pass needs: weights are exp2((raw - anchor)*factor + stats[2 or
    3]).
    """
    tl.store(lse_ptr + row, lse, mask=exist)
    at = stats_ptr + row * 4
    tl.store(at, stats[0], mask=exist)
    tl.store(at + 1, stats[1], mask=exist)
    tl.store(at + 2, stats[2], mask=exist)
    tl.store(at + 3, stats[3], mask=exist)


@triton.jit
def layout_attention_row_fwd_kernel(
    q, k, v, q_words, k_words, strength,  # (pointer, strides)
    out, lse_ptr, stats_ptr, num_heads, seqlen_q, seqlen_k, sm_scale,
    MODULATION: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of query rows against all keys, which fit one tile: no state, no lists."""
    tiles_per_head = tl.cdiv(seqlen_q, BLOCK_M)
    index = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    batch, head = index // num_heads, index % num_heads
    tokens, exist = tokens_at(
        (tl.program_id(0) % tiles_per_head) * BLOCK_M, None, batch, seqlen_q, BLOCK_M
    )
    keys, there = tokens_at(0, None, batch, seqlen_k, BLOCK_N)
    rows = load_rows(
        head_of(q, batch, head), row_stride(q), tokens, exist, PART_0, PART_1, HEAD_DIM
    )
    columns = load_rows(
        head_of(k, batch, head), row_stride(k), keys, there, PART_0, PART_1, HEAD_DIM
    )
    c = tl.load(
        head_of(strength, batch, head) + tokens * row_stride(strength), mask=exist, other=0.0
    )
    tau = temperature(c, MODULATION) * sm_scale
    row_words, key_words = (
        words_at(q_words, batch, tokens, exist),
        words_at(k_words, batch, keys, there),
    )

    raw = products(rows, columns, PART_1, PRECISION)
    raw = -raw if NEGATE else raw
    meets = (row_words[:, None] & key_words[None, :]) != 0
    inside = (meets & there[None, :]) if MODULATION == "mask" else there[None, :]
    row_max = tl.max(tl.where(inside, raw, float("-inf")), 1)
    row_min = tl.min(tl.where(inside, raw, float("inf")), 1) if MODULATION == "range" else row_max
    add_in, add_out, common = additions(c, sm_scale * row_max, sm_scale * row_min, MODULATION)
    add_in, add_out = add_in * LOG2_E, add_out * LOG2_E
    anchor, factor = anchor_of(row_max, row_min, tau, MODULATION), (tau * LOG2_E)[:, None]
    distance = raw - anchor[:, None]
    exponents = tl.fma(distance, factor, tl.where(meets, add_in[:, None], add_out[:, None]))
    largest = finite_or_zero(tl.max(tl.where(inside, exponents, float("-inf")), 1))
    add_in, add_out = (
        add_in - largest,
        add_out - largest,
    )  # before the sum, which would round the distances off
    exponents = tl.fma(distance, factor, tl.where(meets, add_in[:, None], add_out[:, None]))
    weights = tl.where(inside, tl.exp2(exponents), 0.0)
    row_sum = tl.sum(weights, 1)
    inverse = tl.where(row_sum == 0, 0.0, 1 / row_sum)
    values = load_rows(
        head_of(v, batch, head), row_stride(v), keys, there, PART_0, PART_1, HEAD_DIM
    )
    acc = zero_rows(BLOCK_M, PART_0, PART_1)
    acc = add_product(acc, weights.to(values[0].dtype), values, PART_1, PRECISION)
    log_sum = tl.log2(row_sum)
    lse = tl.where(row_sum == 0, float("-inf"), (largest + log_sum) * LN_2 + anchor * tau + common)
    acc = scale_rows(acc, inverse, PART_1)
    store_rows(
        head_of(out, batch, head), row_stride(out), tokens, exist, acc, PART_0, PART_1, HEAD_DIM
    )
    # A row without keys has offsets of -inf, so that it weighs nothing.
    shift = tl.where(row_sum == 0, float("inf"), log_sum)
    _store_numbers(
        lse,
        (row_max, row_min, add_in - shift, add_out - shift),
        lse_ptr,
        stats_ptr,
        index * seqlen_q + tokens,
        exist,
    )
