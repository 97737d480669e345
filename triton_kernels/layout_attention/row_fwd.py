"""Layout attention forward where the whole row of scores is one tile."""

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
    finite_or_zero,
    load_head,
    load_numbers,
    products,
    scale_rows,
    store_head,
    temperature,
    tokens_at,
    words_at,
    zero_rows,
)


@triton.jit
def layout_attention_row_fwd_kernel(
    q,
    k,
    v,
    q_words,
    k_words,
    strength,  # (pointer, strides)
    out,
    lse_ptr,
    stats_ptr,
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
    """One tile of query rows against all keys, which fit one tile: no state, no lists."""
    tiles_per_head = tl.cdiv(seqlen_q, BLOCK_M)
    index = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    batch, head = index // num_heads, index % num_heads
    tile = tl.program_id(0) % tiles_per_head
    tokens, exist = tokens_at(tile * BLOCK_M, None, batch, seqlen_q, BLOCK_M)
    keys, there = tokens_at(0, None, batch, seqlen_k, BLOCK_N)
    rows = load_head(q, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    columns = load_head(k, batch, head, keys, there, PART_0, PART_1, HEAD_DIM)
    c = load_numbers(strength, batch, head, tokens, exist)
    tau = temperature(c, MODULATION) * sm_scale
    row_words = words_at(q_words, batch, tokens, exist)
    key_words = words_at(k_words, batch, keys, there)

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
    # Before the sum, which would round the distances off.
    add_in, add_out = add_in - largest, add_out - largest
    exponents = tl.fma(distance, factor, tl.where(meets, add_in[:, None], add_out[:, None]))
    weights = tl.where(inside, tl.exp2(exponents), 0.0)
    row_sum = tl.sum(weights, 1)
    inverse = tl.where(row_sum == 0, 0.0, 1 / row_sum)
    values = load_head(v, batch, head, keys, there, PART_0, PART_1, HEAD_DIM)
    acc = zero_rows(BLOCK_M, PART_0, PART_1)
    acc = add_product(acc, weights.to(values[0].dtype), values, PART_1, PRECISION)
    log_sum = tl.log2(row_sum)
    lse = tl.where(row_sum == 0, float("-inf"), (largest + log_sum) * LN_2 + anchor * tau + common)
    acc = scale_rows(acc, inverse, PART_1)
    store_head(out, batch, head, tokens, exist, acc, PART_0, PART_1, HEAD_DIM)
    # A row without keys has offsets of -inf, so that it weighs nothing.
    shift = tl.where(row_sum == 0, float("inf"), log_sum)
    stats = (row_max, row_min, add_in - shift, add_out - shift)
    store_stats(lse, stats, lse_ptr, stats_ptr, index * seqlen_q + tokens, exist)
