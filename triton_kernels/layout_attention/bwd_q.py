"""Layout attention backward, the pass over query tiles.

The gradient through a row's largest and smallest score is a rank-one term of two keys: this pass
adds it to dq and leaves its two factors and the keys' places, the pass over key tiles adds it where
a key is in that place. No sums are shared, so every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.records import (
    KEY_OF_MAX,
    KEY_OF_MIN,
    NUM_NUMBERS,
    NUM_PLACES,
    NUM_STATS,
    RAW_MAX,
    SHIFT,
    THROUGH_MAX,
    THROUGH_MIN,
    lift_of,
    load_stats,
    store_record,
    weights_of,
)
from dense_attn.triton_kernels.layout_attention.tiles import listed_tiles, tile_at
from dense_attn.triton_kernels.primitives import (
    LOG2_E,
    add_product,
    head_of,
    load_head,
    load_numbers,
    load_part,
    load_rows,
    products,
    row_stride,
    scale_rows,
    store_part,
    temperature,
    tile_of_program,
    tokens_at,
    words_at,
    zero_rows,
)


@triton.jit
def _first_extreme(best, best_key, raw, there, keys, LARGEST: tl.constexpr):
    """Running extreme of raw scores [rows, keys] and the first key that has it."""
    there, places = there[None, :], keys.to(tl.int32)[None, :]
    sign = 1.0 if LARGEST else -1.0
    signed = tl.where(there, raw * sign, float("-inf"))
    extreme = tl.max(signed, 1)
    key = tl.min(tl.where(signed == extreme[:, None], places, 2147483647), 1)
    better = extreme > best
    return tl.where(better, extreme, best), tl.where(better, key, best_key)


@triton.jit
def _lse_gradient(grad_lse, batch, head, tokens, exist, ROWS: tl.constexpr):
    """The gradient of rows' lse; 0 where there is none."""
    gradient = tl.zeros([ROWS], tl.float32)
    if grad_lse is not None:
        gradient = load_numbers(grad_lse, batch, head, tokens, exist)
    return gradient


@triton.jit
def _inner_products(
    a,
    b,
    batch,
    head,
    tokens,
    exist,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Inner products of the rows of two [B, H, tokens, D] tensors, one part after the other."""
    a_base, b_base = head_of(a, batch, head), head_of(b, batch, head)
    x = load_part(a_base, row_stride(a), tokens, exist, 0, PART_0, HEAD_DIM).to(tl.float32)
    y = load_part(b_base, row_stride(b), tokens, exist, 0, PART_0, HEAD_DIM)
    total = _sum(x * y, exist[:, None], True)
    if PART_1 > 0:
        x = load_part(a_base, row_stride(a), tokens, exist, PART_0, PART_1, HEAD_DIM).to(tl.float32)
        y = load_part(b_base, row_stride(b), tokens, exist, PART_0, PART_1, HEAD_DIM)
        total += _sum(x * y, exist[:, None], True)
    return total


@triton.jit
def _add_sums(
    sums,
    grad,
    weights,
    distance,
    meets,
    there,
    MODULATION: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A row's sums over keys, one tile further: of matched keys' ds', of ds' times the distance to
    the key's extreme, of all ds', and of weights as of the first two.
    """
    grad_in, grad_distance, grad_all, weight_in, weight_distance = sums
    grad_in = _add(grad_in, tl.sum(tl.where(meets, grad, 0.0), 1), EXACT)
    if EXACT:
        grad_all = _add(grad_all, _sum(grad, there, EXACT), EXACT)
        weight_in += tl.sum(tl.where(meets, weights, 0.0), 1)
    if MODULATION == "range":
        grad_distance = _add(grad_distance, _sum(grad * distance, there, EXACT), EXACT)
        if EXACT:
            weight_distance += _sum(weights * distance, there, EXACT)
    return grad_in, grad_distance, grad_all, weight_in, weight_distance


@triton.jit
def _add(total, x, EXACT: tl.constexpr):
    """(total, what its last rounding took too much) + x. Many tiles of small weights would each be
    lost in a plain sum of a few large ones.
    """
    if EXACT:
        x -= total[1]
        larger = total[0] + x
        found = larger, (larger - total[0]) - x
    else:
        found = total[0] + x, total[1]
    return found


@triton.jit
def _sum(products, there, APART: tl.constexpr):
    """Each row's sum of products. Where a lane has one product of a row, it would fuse with the
    first exchange between lanes and leave them with sums that differ: a select keeps them apart.
    """
    return tl.sum(tl.where(there, products, 0.0) if APART else products, 1)


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
    # [heads, NUMBERS, rows] what the pass over keys needs, int32 [heads, 2, rows] keys of extremes
    numbers_ptr,
    places_ptr,
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
    """One tile of query rows against all keys: dq, dstrength, and what the pass over keys needs of
    each row.
    """
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    index, tile, batch, head = tile_of_program(num_heads, seqlen_q, BLOCK_M)
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    shift = _inner_products(grad_out, out, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    shift -= _lse_gradient(grad_lse, batch, head, tokens, exist, BLOCK_M)
    rows = load_head(q, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    grads = load_head(grad_out, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    row_words = words_at(q_words, batch, tokens, exist)
    c = load_numbers(strength, batch, head, tokens, exist)
    tau = temperature(c, MODULATION) * sm_scale
    row = index * seqlen_q + tokens
    high, low, anchor, add_in, add_out = load_stats(
        stats_ptr, row, exist, tau * LOG2_E, MODULATION, EXACT
    )
    record = numbers_ptr + index * NUM_NUMBERS * seqlen_q + tokens
    lift = lift_of(sm_scale, q[0].dtype.element_ty)
    store_record(record, seqlen_q, exist, tau * LOG2_E, add_in, add_out, anchor, row_words, lift)

    k_base, v_base = head_of(k, batch, head), head_of(v, batch, head)
    nothing = tl.zeros([BLOCK_M], tl.float32)
    best, best_key = nothing + float("-inf"), tl.zeros([BLOCK_M], tl.int32)
    least, least_key = best, best_key
    acc, zero = zero_rows(BLOCK_M, PART_0, PART_1), (nothing, nothing)
    sums = zero, zero, zero, nothing, nothing
    listed, num_whole, count = listed_tiles(tiles, counts, batch, tile, tl.cdiv(seqlen_k, BLOCK_N))
    for place in range(count):
        first = tile_at(listed, tl.cdiv(seqlen_k, BLOCK_N), place, num_whole, tiles) * BLOCK_N
        keys, there = tokens_at(first, k_order, batch, seqlen_k, BLOCK_N)
        columns = load_rows(k_base, row_stride(k), keys, there, PART_0, PART_1, HEAD_DIM)
        values = load_rows(v_base, row_stride(v), keys, there, PART_0, PART_1, HEAD_DIM)
        meets = (row_words[:, None] & words_at(k_words, batch, keys, there)[None, :]) != 0
        raw = products(rows, columns, PART_1, PRECISION)
        raw = -raw if NEGATE else raw
        offsets = tl.where(meets, add_in[:, None], add_out[:, None])
        weights = weights_of(raw, (tau * LOG2_E)[:, None], anchor[:, None], offsets, EXACT)
        weights = tl.where(there[None, :] & ((MODULATION != "mask") | meets), weights, 0.0)
        grad = weights * (products(grads, values, PART_1, PRECISION) - shift[:, None])  # ds'
        distance = tl.where(meets, high[:, None], low[:, None]) - raw
        sums = _add_sums(sums, grad, weights, distance, meets, there[None, :], MODULATION, EXACT)
        if MODULATION == "range":
            least, least_key = _first_extreme(least, least_key, raw, there, keys, False)
        if MODULATION == "range" or MODULATION == "max":
            best, best_key = _first_extreme(best, best_key, raw, there, keys, True)
        acc = add_product(acc, grad.to(columns[0].dtype), columns, PART_1, PRECISION)

    # Read again, so that the loop need not carry them.
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    row = index * seqlen_q + tokens
    c = load_numbers(strength, batch, head, tokens, exist)
    through_lse = _lse_gradient(grad_lse, batch, head, tokens, exist, BLOCK_M)
    grad_in, grad_distance, grad_all, weight_in, weight_distance = sums
    grad_in, grad_distance, grad_all = grad_in[0], grad_distance[0], grad_all[0]
    # ds' sums to grad_lse over a row: what is left delta has missed, and is taken out of the sums.
    if EXACT:
        missed = grad_all - through_lse
        grad_in = grad_in - missed * weight_in
        grad_distance = grad_distance - missed * weight_distance
        shift += missed
    signed_scale = -sm_scale if NEGATE else sm_scale
    acc = scale_rows(acc, temperature(c, MODULATION) * signed_scale, PART_1)
    record = numbers_ptr + index * NUM_NUMBERS * seqlen_q + tokens
    pair = places_ptr + index * NUM_PLACES * seqlen_q + tokens
    tl.store(
        record + SHIFT * seqlen_q,
        -shift * (temperature(c, MODULATION) * sm_scale * LOG2_E),
        mask=exist,
    )
    grad_strength = grad_in if MODULATION == "bias" else nothing
    through_max, through_min = nothing, nothing
    if MODULATION == "max" or MODULATION == "range":
        high = tl.load(stats_ptr + row * NUM_STATS + RAW_MAX, mask=exist, other=0.0)
        grad_strength = sm_scale * high * grad_in
        through_max = c * grad_in
        tl.store(record + THROUGH_MAX * seqlen_q, through_max, mask=exist)
        tl.store(pair + KEY_OF_MAX * seqlen_q, best_key, mask=exist)
    if MODULATION == "range":
        grad_strength = sm_scale * grad_distance
        through_min = c * (through_lse - grad_in)
        tl.store(record + THROUGH_MIN * seqlen_q, through_min, mask=exist)
        tl.store(pair + KEY_OF_MIN * seqlen_q, least_key, mask=exist)
    tl.store(dstrength_ptr + row, grad_strength, mask=exist)
    through = (signed_scale * through_max, best_key, signed_scale * through_min, least_key)
    at, source = (head_of(dq, batch, head), row_stride(dq), tokens, exist), (k_base, row_stride(k))
    _store_dq(at, acc[0], through, source, MODULATION, 0, PART_0, HEAD_DIM)
    if PART_1 > 0:  # after the first, so that the rows of one part at a time are held
        _store_dq(at, acc[1], through, source, MODULATION, PART_0, PART_1, HEAD_DIM)


@triton.jit
def _store_dq(
    at,
    part,
    through,
    k,
    MODULATION: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Columns of dq, with the rank-one term of the keys of a row's extremes."""
    base, stride, tokens, exist = at
    if MODULATION == "max" or MODULATION == "range":
        best = load_part(k[0], k[1], through[1].to(tl.int64), exist, FIRST, PART, HEAD_DIM)
        part += through[0][:, None] * best.to(tl.float32)
    if MODULATION == "range":
        least = load_part(k[0], k[1], through[3].to(tl.int64), exist, FIRST, PART, HEAD_DIM)
        part += through[2][:, None] * least.to(tl.float32)
    store_part(base, stride, tokens, exist, part, FIRST, PART, HEAD_DIM)
