"""Plain attention backward: a pass over query tiles, then one over key tiles, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
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
def _add_dq(
    acc,
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
    """Gradient of a tile of queries through one tile of keys."""
    queries, grads, lse, delta = rows
    columns = load(tensors[0], at, first, seqlen, BLOCK_N, MASKED, PARTS)
    values = load(tensors[1], at, first, seqlen, BLOCK_N, MASKED, PARTS)
    raw = products(queries, columns, PARTS, PRECISION)
    weights = tl.exp2(raw * factor - lse[:, None])
    if MASKED:
        weights = tl.where((first + tl.arange(0, BLOCK_N) < seqlen)[None, :], weights, 0.0)
    grad = weights * (products(grads, values, PARTS, PRECISION) - delta[:, None])
    return add_product(acc, grad, columns, PARTS, PRECISION)


@triton.jit
def plain_attention_bwd_q_kernel(
    grad_out,
    q,
    k,
    v,
    out,
    lse_ptr,
    delta_ptr,
    dq,
    num_heads,
    seqlen_q,
    seqlen_k,
    scale,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of query rows against all keys: dq, and delta for the pass over keys."""
    index, at, tile, tokens = place_of_program(num_heads, seqlen_q, BLOCK_M)
    grads = load(grad_out, at, tile, seqlen_q, BLOCK_M, True, PARTS)
    results = load(out, at, tile, seqlen_q, BLOCK_M, True, PARTS)
    delta = tl.sum(grads[0].to(tl.float32) * results[0], 1)
    if PARTS[2] > 0:
        delta += tl.sum(grads[1].to(tl.float32) * results[1], 1)
    row, exist = index * seqlen_q + tokens, tokens < seqlen_q
    tl.store(delta_ptr + row, delta, mask=exist)
    lse = tl.load(lse_ptr + row, mask=exist, other=0.0) * LOG2_E
    rows = (load(q, at, tile, seqlen_q, BLOCK_M, True, PARTS), grads, lse, delta)
    factor, acc = scale * LOG2_E, zeros(BLOCK_M, PARTS[1], PARTS[2])
    whole = seqlen_k // BLOCK_N * BLOCK_N
    for first in range(0, whole, BLOCK_N):
        acc = _add_dq(
            acc, rows, (k, v), at, first, seqlen_k, factor, False, PARTS, PRECISION, BLOCK_N
        )
    if whole < seqlen_k:
        acc = _add_dq(
            acc, rows, (k, v), at, whole, seqlen_k, factor, True, PARTS, PRECISION, BLOCK_N
        )
    acc = scaled(acc, tl.zeros([BLOCK_M], tl.float32) + scale, PARTS)
    store(dq, at, tile, seqlen_q, acc, BLOCK_M, PARTS)


@triton.jit
def _add_dkv(
    state,
    columns,
    tensors,
    numbers,
    at,
    first,
    seqlen,
    factor,
    MASKED: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Gradients of a tile of keys through one tile of queries; scores are [keys, rows]."""
    acc_k, acc_v = state
    queries = load(tensors[0], at, first, seqlen, BLOCK_M, MASKED, PARTS)
    grads = load(tensors[1], at, first, seqlen, BLOCK_M, MASKED, PARTS)
    rows = tl.arange(0, BLOCK_M)
    if MASKED:  # rows that do not exist are zeros, which add nothing
        exist = first + rows < seqlen
        lse = tl.load(numbers[0] + first + rows, mask=exist, other=0.0)
        delta = tl.load(numbers[1] + first + rows, mask=exist, other=0.0)
    else:
        lse, delta = tl.load(numbers[0] + first + rows), tl.load(numbers[1] + first + rows)
    raw = products(columns[0], queries, PARTS, PRECISION)
    weights = tl.exp2(raw * factor - (lse * LOG2_E)[None, :])
    acc_v = add_product(acc_v, weights, grads, PARTS, PRECISION)
    grad = weights * (products(columns[1], grads, PARTS, PRECISION) - delta[None, :])
    return add_product(acc_k, grad, queries, PARTS, PRECISION), acc_v


@triton.jit
def plain_attention_bwd_kv_kernel(
    grad_out,
    q,
    k,
    v,
    lse_ptr,
    delta_ptr,
    dk,
    dv,
    num_heads,
    seqlen_q,
    seqlen_k,
    scale,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of keys against all query rows: dk and dv."""
    index, at, tile, _ = place_of_program(num_heads, seqlen_k, BLOCK_N)
    columns = load(k, at, tile, seqlen_k, BLOCK_N, True, PARTS)
    own = (columns, load(v, at, tile, seqlen_k, BLOCK_N, True, PARTS))
    tensors, numbers = (q, grad_out), (lse_ptr + index * seqlen_q, delta_ptr + index * seqlen_q)
    state = (zeros(BLOCK_N, PARTS[1], PARTS[2]), zeros(BLOCK_N, PARTS[1], PARTS[2]))
    factor, whole = scale * LOG2_E, seqlen_q // BLOCK_M * BLOCK_M
    for first in range(0, whole, BLOCK_M):
        state = _add_dkv(
            state,
            own,
            tensors,
            numbers,
            at,
            first,
            seqlen_q,
            factor,
            False,
            PARTS,
            PRECISION,
            BLOCK_M,
        )
    if whole < seqlen_q:
        state = _add_dkv(
            state,
            own,
            tensors,
            numbers,
            at,
            whole,
            seqlen_q,
            factor,
            True,
            PARTS,
            PRECISION,
            BLOCK_M,
        )
    acc_k = scaled(state[0], tl.zeros([BLOCK_N], tl.float32) + scale, PARTS)
    store(dk, at, tile, seqlen_k, acc_k, BLOCK_N, PARTS)
    store(dv, at, tile, seqlen_k, state[1], BLOCK_N, PARTS)
