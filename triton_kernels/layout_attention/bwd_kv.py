"""Layout attention backward, the pass over key tiles, which takes what the first has found."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.records import (
    ADD_IN,
    ADD_OUT,
    ANCHOR,
    FACTOR,
    KEY_OF_MAX,
    KEY_OF_MIN,
    NUM_NUMBERS,
    NUM_PLACES,
    SHIFT,
    TEMPERATURE,
    THROUGH_MAX,
    THROUGH_MIN,
    weights_of,
)
from dense_attn.triton_kernels.layout_attention.tiles import listed_tiles, tile_at
from dense_attn.triton_kernels.primitives import (
    add_product,
    load_head,
    products,
    scale_rows,
    store_head,
    tile_of_program,
    tokens_at,
    words_at,
    zero_rows,
)


@triton.jit
def layout_attention_bwd_kv_kernel(
    grad_out,
    q,
    k,
    v,
    q_words,
    k_words,
    q_order,
    k_order,
    # what the pass over queries has left
    numbers_ptr,
    places_ptr,
    # of key tiles, each with the query tiles that it meets
    tiles,
    counts,
    dk,
    dv,
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
    """One tile of keys against all query rows: dk and dv."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    index, tile, batch, head = tile_of_program(num_heads, seqlen_k, BLOCK_N)
    keys, there = tokens_at(tile * BLOCK_N, k_order, batch, seqlen_k, BLOCK_N)
    columns = load_head(k, batch, head, keys, there, PART_0, PART_1, HEAD_DIM)
    values = load_head(v, batch, head, keys, there, PART_0, PART_1, HEAD_DIM)
    key_words, key_at = words_at(k_words, batch, keys, there), keys.to(tl.int32)[:, None]
    acc_k, acc_v = zero_rows(BLOCK_N, PART_0, PART_1), zero_rows(BLOCK_N, PART_0, PART_1)
    listed, num_whole, count = listed_tiles(tiles, counts, batch, tile, tl.cdiv(seqlen_q, BLOCK_M))
    for place in range(count):
        first = tile_at(listed, tl.cdiv(seqlen_q, BLOCK_M), place, num_whole, tiles) * BLOCK_M
        tokens, exist = tokens_at(first, q_order, batch, seqlen_q, BLOCK_M)
        rows = load_head(q, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
        grads = load_head(grad_out, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
        record = numbers_ptr + index * NUM_NUMBERS * seqlen_q + tokens
        pair = places_ptr + index * NUM_PLACES * seqlen_q + tokens
        factor = tl.load(record + FACTOR * seqlen_q, mask=exist, other=0.0)
        add_in = tl.load(record + ADD_IN * seqlen_q, mask=exist, other=0.0)
        add_out = tl.load(record + ADD_OUT * seqlen_q, mask=exist, other=0.0)
        anchor = tl.load(record + ANCHOR * seqlen_q, mask=exist, other=0.0) if EXACT else factor
        raw = products(columns, rows, PART_1, PRECISION)  # [keys, rows]
        raw = -raw if NEGATE else raw
        meets = (key_words[:, None] & words_at(q_words, batch, tokens, exist)[None, :]) != 0
        offsets = tl.where(meets, add_in[None, :], add_out[None, :])
        # Rows that do not exist have zeros for gradients; keys that do not exist are not stored.
        weights = weights_of(raw, factor[None, :], anchor[None, :], offsets, EXACT)
        if MODULATION == "mask":
            weights = tl.where(meets, weights, 0.0)
        acc_v = add_product(acc_v, weights.to(grads[0].dtype), grads, PART_1, PRECISION)
        shift = tl.load(record + SHIFT * seqlen_q, mask=exist, other=0.0)
        grad = weights * (products(values, grads, PART_1, PRECISION) - shift[None, :])  # ds'
        if MODULATION == "range":
            grad = grad * tl.load(record + TEMPERATURE * seqlen_q, mask=exist, other=0.0)[None, :]
            through_min = tl.load(record + THROUGH_MIN * seqlen_q, mask=exist, other=0.0)
            least_key = tl.load(pair + KEY_OF_MIN * seqlen_q, mask=exist, other=-1)
            grad += tl.where(key_at == least_key[None, :], through_min[None, :], 0.0)
        if MODULATION == "range" or MODULATION == "max":
            through_max = tl.load(record + THROUGH_MAX * seqlen_q, mask=exist, other=0.0)
            best_key = tl.load(pair + KEY_OF_MAX * seqlen_q, mask=exist, other=-1)
            grad += tl.where(key_at == best_key[None, :], through_max[None, :], 0.0)
        acc_k = add_product(acc_k, grad.to(rows[0].dtype), rows, PART_1, PRECISION)
    signed_scale = tl.zeros([BLOCK_N], tl.float32) + (-sm_scale if NEGATE else sm_scale)
    acc_k = scale_rows(acc_k, signed_scale, PART_1)
    store_head(dk, batch, head, keys, there, acc_k, PART_0, PART_1, HEAD_DIM)
    store_head(dv, batch, head, keys, there, acc_v, PART_0, PART_1, HEAD_DIM)
