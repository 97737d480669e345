"""Plain attention forward."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    LN_2,
    LOG2_E,
    add_product,
    load,
    place_of_program,
    products,
    scaled,
    store,
    zeros,
)


@triton.jit
def _attend(
    state,
    rows,
    tensors,
    at,
    first,
    seqlen,
    factor,
    MASKED: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over one tile of keys; the running maximum is in exponents of 2."""
    row_max, row_sum, acc = state
    columns = load(tensors[0], at, first, seqlen, BLOCK_N, MASKED, PARTS)
    raw = products(rows, columns, PARTS, PRECISION)
    if MASKED:
        raw = tl.where((first + tl.arange(0, BLOCK_N) < seqlen)[None, :], raw, float("-inf"))
    now = tl.maximum(row_max, tl.max(raw, 1) * factor)
    weights = tl.exp2(raw * factor - now[:, None])
    alpha = tl.exp2(row_max - now)
    row_sum = row_sum * alpha + tl.sum(weights, 1)
    values = load(tensors[1], at, first, seqlen, BLOCK_N, MASKED, PARTS)
    acc = add_product(scaled(acc, alpha, PARTS), weights, values, PARTS, PRECISION)
    return now, row_sum, acc


@triton.jit
def plain_attention_fwd_kernel(
    q,
    k,
    v,
    out,
    lse_ptr,
    num_heads,
    seqlen_q,
    seqlen_k,
    scale,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of query rows against all keys: out and lse."""
    index, at, tile, tokens = place_of_program(num_heads, seqlen_q, BLOCK_M)
    rows = load(q, at, tile, seqlen_q, BLOCK_M, True, PARTS)
    nothing, factor = tl.zeros([BLOCK_M], tl.float32), scale * LOG2_E
    state = (nothing - float("inf"), nothing, zeros(BLOCK_M, PARTS[1], PARTS[2]))
    whole = seqlen_k // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        state = _attend(
            state, rows, (k, v), at, first, seqlen_k, factor, False, PARTS, PRECISION, BLOCK_N
        )
    if whole < seqlen_k:
        state = _attend(
            state, rows, (k, v), at, whole, seqlen_k, factor, True, PARTS, PRECISION, BLOCK_N
        )
    row_max, row_sum, acc = state
    lse = (row_max + tl.log2(row_sum)) * LN_2
    tl.store(lse_ptr + index * seqlen_q + tokens, lse, mask=tokens < seqlen_q)
    store(out, at, tile, seqlen_q, scaled(acc, 1 / row_sum, PARTS), BLOCK_M, PARTS)
