"""Layout attention backward: one pass over query tiles, then one over key tiles that takes what the
first has found.

The gradient through a row's largest and smallest score is a rank-one term of two keys: the first
pass adds it to dq and leaves its two factors and the keys' places, the second adds it where a key
is in that place. No sums are shared, so every run gives the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import (
    LOG2_E,
    add_product,
    anchor_of,
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
def _first_tile(listed, tiles_listed, place, num_whole, tiles):
    """Tile at a place of a list, matched ones first; without a list, the place."""
    tile = place
    if tiles is not None:
        tile = tl.load(listed + place + tl.where(place < num_whole, 0, tiles_listed - num_whole))
    return tile


@triton.jit
def _listed(tiles, counts, batch, tile, num_tiles):
    """(list, its wholly matched tiles, all tiles to visit) of one tile; every tile where there is
    no list.
    """
    listed, num_whole, count = tile, 0, num_tiles
    if tiles is not None:
        listed = (
            tiles[0] + batch * tiles[1] + tile * tl.cast(2 * num_tiles, tl.int64)
        )  # a size of 1 is no tensor
        at = counts[0] + batch * counts[1] + tile * 3
        num_whole = tl.load(at)
        count = num_whole + tl.load(at + 1)
    return listed, num_whole, count


@triton.jit
def _weights(raw, factor, anchor, offsets, EXACT: tl.constexpr):
    """The softmax's weights from raw scores, all [I, J] or broadcastable."""
    return tl.exp2(tl.fma(raw - anchor if EXACT else raw, factor, offsets))


@triton.jit
def _row_numbers(stats_ptr, row, exist, factor, MODULATION: tl.constexpr, EXACT: tl.constexpr):
    """(raw maximum, minimum, anchor, offset of matched keys, of the others) of rows; 0 for those
    that do not exist.
    """
    at = stats_ptr + row * 4
    high, low = tl.load(at, mask=exist, other=0.0), tl.load(at + 1, mask=exist, other=0.0)
    add_in, add_out = tl.load(at + 2, mask=exist, other=0.0), tl.load(at + 3, mask=exist, other=0.0)
    anchor = anchor_of(high, low, factor, MODULATION)
    if not EXACT:
        add_in, add_out = add_in - anchor * factor, add_out - anchor * factor
    return high, low, anchor, add_in, add_out


@triton.jit
def _store_record(record, exist, factor, add_in, add_out, anchor, tau):
    """The first five of the eight numbers of a row that the pass over keys reads."""
    tl.store(record, factor, mask=exist)
    tl.store(record + 1, add_in, mask=exist)
    tl.store(record + 2, add_out, mask=exist)
    tl.store(record + 3, anchor, mask=exist)
    tl.store(record + 4, tau, mask=exist)


@triton.jit
def _first_extreme(best, best_key, raw, there, keys, LARGEST: tl.constexpr):
    """Running extreme of raw scores [rows, keys] and the first key that has it."""
    sign = 1.0 if LARGEST else -1.0
    signed = tl.where(there, raw * sign, float("-inf"))
    extreme = tl.max(signed, 1)
    key = tl.min(tl.where(signed == extreme[:, None], keys, 2147483647), 1)
    better = extreme > best
    return tl.where(better, extreme, best), tl.where(better, key, best_key)


@triton.jit
def _lse_gradient(grad_lse, batch, head, tokens, exist, ROWS: tl.constexpr):
    """What flows back into rows' lse; 0 where nothing does."""
    gradient = tl.zeros([ROWS], tl.float32)
    if grad_lse is not None:
        gradient = tl.load(
            head_of(grad_lse, batch, head) + tokens * row_stride(grad_lse), mask=exist, other=0.0
        )
    return gradient


@triton.jit
def _inner_products(
    a, b, batch, head, tokens, exist, PART_0: tl.constexpr, PART_1: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Of rows of two [B, H, tokens, D] tensors, one part after the other."""
    a_base, b_base = head_of(a, batch, head), head_of(b, batch, head)
    x = load_part(a_base, row_stride(a), tokens, exist, 0, PART_0, HEAD_DIM)
    total = tl.sum(
        x.to(tl.float32) * load_part(b_base, row_stride(b), tokens, exist, 0, PART_0, HEAD_DIM), 1
    )
    if PART_1 > 0:
        x = load_part(a_base, row_stride(a), tokens, exist, PART_0, PART_1, HEAD_DIM)
        total += tl.sum(
            x.to(tl.float32)
            * load_part(b_base, row_stride(b), tokens, exist, PART_0, PART_1, HEAD_DIM),
            1,
        )
    return total


@triton.jit
def layout_attention_bwd_q_kernel(
    # as in the forward pass
    grad_out, grad_lse, q, k, v, q_words, k_words, q_order, k_order, strength, out, stats_ptr,
    tiles, counts, dq, dstrength_ptr,
    # [rows, 8] what the pass over keys needs, int32 [rows, 2] keys of the extremes
    numbers_ptr, places_ptr,
    num_heads, seqlen_q, seqlen_k, sm_scale,
    MODULATION: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of query rows against all keys: dq, dstrength, and what the pass over keys needs of
    each row.
    """
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    tiles_per_head = tl.cdiv(seqlen_q, BLOCK_M)
    index = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    tile = tl.program_id(0) % tiles_per_head
    batch, head = index // num_heads, index % num_heads
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    shift = _inner_products(grad_out, out, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    shift -= _lse_gradient(grad_lse, batch, head, tokens, exist, BLOCK_M)
    rows = load_rows(
        head_of(q, batch, head), row_stride(q), tokens, exist, PART_0, PART_1, HEAD_DIM
    )
    grads = load_rows(
        head_of(grad_out, batch, head),
        row_stride(grad_out),
        tokens,
        exist,
        PART_0,
        PART_1,
        HEAD_DIM,
    )
    row_words = words_at(q_words, batch, tokens, exist)
    c = tl.load(
        head_of(strength, batch, head) + tokens * row_stride(strength), mask=exist, other=0.0
    )
    tau = temperature(c, MODULATION) * sm_scale
    row = index * seqlen_q + tokens
    high, low, anchor, add_in, add_out = _row_numbers(
        stats_ptr, row, exist, tau * LOG2_E, MODULATION, EXACT
    )
    _store_record(
        numbers_ptr + row * 8,
        exist,
        tau * LOG2_E,
        add_in,
        add_out,
        anchor,
        temperature(c, MODULATION),
    )

    k_base, v_base, nothing = (
        head_of(k, batch, head),
        head_of(v, batch, head),
        tl.zeros([BLOCK_M], tl.float32),
    )
    best, best_key = nothing + float("-inf"), tl.zeros([BLOCK_M], tl.int32)
    least, least_key = best, best_key
    grad_in, grad_distance, acc = nothing, nothing, zero_rows(BLOCK_M, PART_0, PART_1)
    grad_all, weight_in, weight_distance = nothing, nothing, nothing
    listed, num_whole, count = _listed(tiles, counts, batch, tile, tl.cdiv(seqlen_k, BLOCK_N))
    for place in range(count):
        first = _first_tile(listed, tl.cdiv(seqlen_k, BLOCK_N), place, num_whole, tiles) * BLOCK_N
        keys, there = tokens_at(first, k_order, batch, seqlen_k, BLOCK_N)
        columns = load_rows(k_base, row_stride(k), keys, there, PART_0, PART_1, HEAD_DIM)
        values = load_rows(v_base, row_stride(v), keys, there, PART_0, PART_1, HEAD_DIM)
        meets = (row_words[:, None] & words_at(k_words, batch, keys, there)[None, :]) != 0
        raw = products(rows, columns, PART_1, PRECISION)
        raw = -raw if NEGATE else raw
        offsets = tl.where(meets, add_in[:, None], add_out[:, None])
        weights = _weights(raw, (tau * LOG2_E)[:, None], anchor[:, None], offsets, EXACT)
        weights = tl.where(there[None, :] & ((MODULATION != "mask") | meets), weights, 0.0)
        grad = weights * (products(grads, values, PART_1, PRECISION) - shift[:, None])  # ds'
        grad_in += tl.sum(tl.where(meets, grad, 0.0), 1)
        if EXACT:
            grad_all += tl.sum(grad, 1)
            weight_in += tl.sum(tl.where(meets, weights, 0.0), 1)
        if MODULATION == "range":
            distance = tl.where(meets, high[:, None], low[:, None]) - raw
            grad_distance += tl.sum(grad * distance, 1)
            if EXACT:
                weight_distance += tl.sum(weights * distance, 1)
            least, least_key = _first_extreme(
                least, least_key, raw, there[None, :], keys.to(tl.int32)[None, :], False
            )
        if MODULATION == "range" or MODULATION == "max":
            best, best_key = _first_extreme(
                best, best_key, raw, there[None, :], keys.to(tl.int32)[None, :], True
            )
        acc = add_product(acc, grad.to(columns[0].dtype), columns, PART_1, PRECISION)

    # Read again, so that the loop need not carry them.
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    row = index * seqlen_q + tokens
    c = tl.load(
        head_of(strength, batch, head) + tokens * row_stride(strength), mask=exist, other=0.0
    )
    through_lse = _lse_gradient(grad_lse, batch, head, tokens, exist, BLOCK_M)
    # ds' sums to grad_lse over a row; what is left is what delta has missed, and is taken out of
    # the sums
    if EXACT:
        missed = grad_all - through_lse
        grad_in, grad_distance = (
            grad_in - missed * weight_in,
            grad_distance - missed * weight_distance,
        )
        shift += missed
    signed_scale = -sm_scale if NEGATE else sm_scale
    acc = scale_rows(acc, temperature(c, MODULATION) * signed_scale, PART_1)
    record = numbers_ptr + row * 8
    tl.store(record + 5, shift, mask=exist)
    grad_strength, through_max, through_min = nothing, nothing, nothing
    if MODULATION == "bias":
        grad_strength = grad_in
    if MODULATION == "max" or MODULATION == "range":
        grad_strength = sm_scale * tl.load(stats_ptr + row * 4, mask=exist, other=0.0) * grad_in
        through_max = c * grad_in
        tl.store(record + 6, through_max, mask=exist)
        tl.store(places_ptr + row * 2, best_key, mask=exist)
    if MODULATION == "range":
        grad_strength = sm_scale * grad_distance
        through_min = c * (through_lse - grad_in)
        tl.store(record + 7, through_min, mask=exist)
        tl.store(places_ptr + row * 2 + 1, least_key, mask=exist)
    tl.store(dstrength_ptr + row, grad_strength, mask=exist)
    through = (signed_scale * through_max, best_key, signed_scale * through_min, least_key)
    at, source = (head_of(dq, batch, head), row_stride(dq), tokens, exist), (k_base, row_stride(k))
    _store_dq(at, acc[0], through, source, MODULATION, 0, PART_0, HEAD_DIM)
    if PART_1 > 0:  # after the first, so that the rows of one part at a time are held
        _store_dq(at, acc[1], through, source, MODULATION, PART_0, PART_1, HEAD_DIM)


@triton.jit
def _store_dq(
    at, part, through, k, MODULATION: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr
):  # fmt: skip
    """Columns of dq, with the rank-one term of the keys of a row's extremes."""
    base, stride, tokens, exist = at
    if MODULATION == "max" or MODULATION == "range":
        best = load_part(k[0], k[1], through[1].to(tl.int64), exist, FIRST, PART, HEAD_DIM)
        part += through[0][:, None] * best.to(tl.float32)
    if MODULATION == "range":
        least = load_part(k[0], k[1], through[3].to(tl.int64), exist, FIRST, PART, HEAD_DIM)
        part += through[2][:, None] * least.to(tl.float32)
    store_part(base, stride, tokens, exist, part, FIRST, PART, HEAD_DIM)


@triton.jit
def layout_attention_bwd_kv_kernel(
    grad_out, q, k, v, q_words, k_words, q_order, k_order, numbers_ptr, places_ptr,  # as above
    tiles, counts,  # of key tiles, each with the query tiles that it meets
    dk, dv, num_heads, seqlen_q, seqlen_k, sm_scale,
    MODULATION: tl.constexpr, NEGATE: tl.constexpr, PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of keys against all query rows: dk and dv."""
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    tiles_per_head = tl.cdiv(seqlen_k, BLOCK_N)
    index = (tl.program_id(0) // tiles_per_head).to(tl.int64)
    tile = tl.program_id(0) % tiles_per_head
    batch, head = index // num_heads, index % num_heads
    keys, there = tokens_at(tile * BLOCK_N, k_order, batch, seqlen_k, BLOCK_N)
    columns = load_rows(
        head_of(k, batch, head), row_stride(k), keys, there, PART_0, PART_1, HEAD_DIM
    )
    values = load_rows(
        head_of(v, batch, head), row_stride(v), keys, there, PART_0, PART_1, HEAD_DIM
    )
    key_words, key_at = words_at(k_words, batch, keys, there), keys.to(tl.int32)[:, None]
    acc_k, acc_v = zero_rows(BLOCK_N, PART_0, PART_1), zero_rows(BLOCK_N, PART_0, PART_1)
    listed, num_whole, count = _listed(tiles, counts, batch, tile, tl.cdiv(seqlen_q, BLOCK_M))
    for place in range(count):
        first = _first_tile(listed, tl.cdiv(seqlen_q, BLOCK_M), place, num_whole, tiles) * BLOCK_M
        tokens, exist = tokens_at(first, q_order, batch, seqlen_q, BLOCK_M)
        row = index * seqlen_q + tokens
        rows = load_rows(
            head_of(q, batch, head), row_stride(q), tokens, exist, PART_0, PART_1, HEAD_DIM
        )
        grads = load_rows(
            head_of(grad_out, batch, head),
            row_stride(grad_out),
            tokens,
            exist,
            PART_0,
            PART_1,
            HEAD_DIM,
        )
        record, pair = numbers_ptr + row * 8, places_ptr + row * 2
        factor = tl.load(record, mask=exist, other=0.0)
        add_in, add_out = (
            tl.load(record + 1, mask=exist, other=0.0),
            tl.load(record + 2, mask=exist, other=0.0),
        )
        anchor = tl.load(record + 3, mask=exist, other=0.0) if EXACT else factor
        raw = products(columns, rows, PART_1, PRECISION)  # [keys, rows]
        raw = -raw if NEGATE else raw
        meets = (key_words[:, None] & words_at(q_words, batch, tokens, exist)[None, :]) != 0
        offsets = tl.where(meets, add_in[None, :], add_out[None, :])
        # Rows that do not exist have zeros for gradients; keys that do not exist are not stored.
        weights = _weights(raw, factor[None, :], anchor[None, :], offsets, EXACT)
        if MODULATION == "mask":
            weights = tl.where(meets, weights, 0.0)
        acc_v = add_product(acc_v, weights.to(grads[0].dtype), grads, PART_1, PRECISION)
        shift = tl.load(record + 5, mask=exist, other=0.0)
        grad = weights * (products(values, grads, PART_1, PRECISION) - shift[None, :])  # ds'
        if MODULATION == "range":
            grad = grad * tl.load(record + 4, mask=exist, other=0.0)[None, :]
            through_min = tl.load(record + 7, mask=exist, other=0.0)
            least_key = tl.load(pair + 1, mask=exist, other=-1)
            grad += tl.where(key_at == least_key[None, :], through_min[None, :], 0.0)
        if MODULATION == "range" or MODULATION == "max":
            through_max = tl.load(record + 6, mask=exist, other=0.0)
            best_key = tl.load(pair, mask=exist, other=-1)
            grad += tl.where(key_at == best_key[None, :], through_max[None, :], 0.0)
        acc_k = add_product(acc_k, grad.to(rows[0].dtype), rows, PART_1, PRECISION)
    signed_scale = tl.zeros([BLOCK_N], tl.float32) + (-sm_scale if NEGATE else sm_scale)
    acc_k = scale_rows(acc_k, signed_scale, PART_1)
    store_rows(
        head_of(dk, batch, head), row_stride(dk), keys, there, acc_k, PART_0, PART_1, HEAD_DIM
    )
    store_rows(
        head_of(dv, batch, head), row_stride(dv), keys, there, acc_v, PART_0, PART_1, HEAD_DIM
    )
