"""Layout attention forward in tiles of keys: those that are wholly of one population, and those
that hold both.

Scores stay raw, as <q, k>, until they meet exp2: `factor` carries the temperature, the scale and
log2(e). The sign of both is in q's rows, so that a state's anchor, the score that weighs most in
it, is always the largest.
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
    finite_or_zero,
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
    tile_of_program,
    tokens_at,
    words_at,
    zero_rows,
)

LEAST_FACTOR = tl.constexpr(2.0**-126)  # so that a score of -inf weighs 0 at a temperature of 0


@triton.jit
def _attend(
    state,
    low,
    query,
    source,
    tiles,
    count,
    plain,
    MODULATION: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over `count` listed tiles whose pairs are all of one population, or over all
    whole tiles.
    """
    exist = tl.full([BLOCK_N], True, tl.int1)
    soon = tl.where(plain, 1, _tile(tiles + 1, count > 1))
    tokens = _tokens(source, tl.where(plain, 0, _tile(tiles, count > 0)), BLOCK_N)
    for place in range(count):
        here = tokens
        tokens = _tokens(source, soon, BLOCK_N)
        tiles += 1
        soon = tl.where(plain, place + 2, _tile(tiles + 1, place < count - 2))
        columns = _rows_of(source[0], here, exist, PART_0, PART_1, HEAD_DIM)
        raw = products(query[0], columns, PART_1, PRECISION)
        if MODULATION == "range":
            low = _lower(low, raw, BLOCK_N)
        values = _rows_of(source[1], here, exist, PART_0, PART_1, HEAD_DIM)
        state = _absorb(state, raw, values, query[2], PART_1, PRECISION)
    return state, low


@triton.jit
def _attend_mixed(
    states,
    low,
    query,
    source,
    tiles,
    count,
    MODULATION: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of both populations over `count` listed tiles."""
    exist = tl.full([BLOCK_N], True, tl.int1)
    tile, soon = _tile(tiles, count > 0), _tile(tiles + 1, count > 1)
    tokens = _tokens(source, tile, BLOCK_N)
    for place in range(count):
        here, first = tokens, tile * BLOCK_N
        tokens = _tokens(source, soon, BLOCK_N)
        tiles += 1
        tile, soon = _tile(tiles, place < count - 1), _tile(tiles + 1, place < count - 2)
        states, low = _visit_mixed(
            states,
            low,
            query,
            source,
            first,
            here,
            exist,
            False,
            False,
            MODULATION,
            PART_0,
            PART_1,
            HEAD_DIM,
            BLOCK_N,
            PRECISION,
        )
    return states, low


@triton.jit
def _tile(at, exists):
    """A tile of a list, 0 behind its end."""
    return tl.load(at, mask=exists, other=0)


@triton.jit
def _tokens(source, tile, BLOCK_N: tl.constexpr):
    """The tokens of a whole tile of keys; an order leads to no other memory."""
    order, batch, last = source[3], source[4], tl.cast(source[5] - 1, tl.uint32)
    places = tl.arange(0, BLOCK_N)
    if order is None:
        tokens = tile * BLOCK_N + places
    else:
        first = order[0] + batch * order[1] + places * order[2]
        tokens = tl.load(first + tile * tl.cast(BLOCK_N * order[2], tl.int64))
    return tl.minimum(tokens.to(tl.uint32, bitcast=True), last)


@triton.jit
def _rows_of(x, tokens, exist, PART_0: tl.constexpr, PART_1: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Both parts of rows of one head: x is (pointer, stride in grains, grain)."""
    if x[2] == 1:
        rows = tokens.to(tl.int64) * x[1]
    else:
        rows = (tokens * tl.cast(x[1], tl.uint32)).to(tl.int64)
    return load_rows(x[0], x[2], rows, exist, PART_0, PART_1, HEAD_DIM)


@triton.jit
def _visit_mixed(
    states,
    low,
    query,
    source,
    first,
    tokens,
    exist,
    plain,
    ENDS: tl.constexpr,
    MODULATION: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile that holds pairs of both populations; keys may end in it."""
    matched, others = states
    q, q_words, factor = query
    words = tl.load(source[2] + first + tl.arange(0, BLOCK_N), mask=exist, other=0)
    columns = _rows_of(source[0], tokens, exist, PART_0, PART_1, HEAD_DIM)
    raw = products(q, columns, PART_1, PRECISION)
    meets = (q_words[:, None] & words[None, :]) != 0
    if ENDS:
        meets = (meets | plain) & exist[None, :]
    inside = tl.where(meets, raw, float("-inf"))
    outside = tl.where(meets, float("-inf"), raw)
    if ENDS:
        outside = tl.where(exist[None, :], outside, float("-inf"))
        raw = tl.where(exist[None, :], raw, float("inf"))
    if MODULATION == "range":
        low = _lower(low, raw, BLOCK_N)
    values = _rows_of(source[1], tokens, exist, PART_0, PART_1, HEAD_DIM)
    matched = _absorb(matched, inside, values, factor, PART_1, PRECISION)
    if MODULATION != "mask":
        others = _absorb(others, outside, values, factor, PART_1, PRECISION)
    return (matched, others), low


@triton.jit
def _lower(low, raw, BLOCK_N: tl.constexpr):
    """Running minima [rows, 4] of the keys that one thread holds of a row."""
    apart = tl.reshape(raw, [raw.shape[0], BLOCK_N // 8, 4, 2])
    return tl.minimum(low, tl.min(tl.min(apart, 3), 1))


@triton.jit
def _absorb(state, scores, values, factor, PART_1: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax over a tile's scores; those of -inf weigh nothing."""
    before, row_sum, acc = state
    EXACT: tl.constexpr = values[0].dtype == tl.float32
    row_max = tl.maximum(before, tl.max(scores, 1))
    anchor = finite_or_zero(row_max)
    alpha = _weights(before[:, None], anchor, factor, EXACT)
    weights = _weights(scores, anchor, factor, EXACT)
    row_sum *= alpha
    if EXACT:
        row_sum += tl.sum(weights, 1)[:, None]
    else:  # the matrix unit's time is cheaper
        weights = weights.to(values[0].dtype)
        ones = tl.full([weights.shape[1], row_sum.shape[1]], 1.0, weights.dtype)
        row_sum = tl.dot(weights, ones, row_sum)
    acc = scale_rows(acc, tl.reshape(alpha, [alpha.shape[0]]), PART_1)
    acc = add_product(acc, weights, values, PART_1, PRECISION)
    return row_max, row_sum, acc


@triton.jit
def _weights(scores, anchor, factor, EXACT: tl.constexpr):
    """exp2((scores - anchor)*factor); one fused multiply-add a score unless the difference must not
    be rounded late.
    """
    if EXACT:
        exponents = (scores - anchor[:, None]) * factor[:, None]
    else:
        exponents = tl.fma(scores, factor[:, None], (-anchor * factor)[:, None])
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
    index, tile, batch, head = tile_of_program(num_heads, seqlen_q, BLOCK_M)
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    row_words = words_at(q_words, batch, tokens, exist)
    c = load_numbers(strength, batch, head, tokens, exist)
    tau = temperature(c, MODULATION)
    turned = (tau < 0) != NEGATE
    base, stride = head_of(q, batch, head), row_stride(q)
    own, own_stride = head_of(out, batch, head), row_stride(out)
    some = tl.max(turned.to(tl.int32), 0) != 0
    if some:
        rows = load_rows(base, stride, tokens, exist, PART_0, PART_1, HEAD_DIM)
        rows = scale_rows(rows, tl.where(turned, -1.0, 1.0), PART_1)
        store_rows(own, own_stride, tokens, exist, rows, PART_0, PART_1, HEAD_DIM)
    tl.debug_barrier()
    base, stride = tl.where(some, own, base), tl.where(some, own_stride, stride)
    rows = load_rows(base, stride, tokens, exist, PART_0, PART_1, HEAD_DIM)
    factor = tl.maximum(tl.abs(tau) * sm_scale * LOG2_E, LEAST_FACTOR)
    keys = (head_of(k, batch, head), k[3], k[4])
    values = (head_of(v, batch, head), v[3], v[4])
    key_tiles = tl.cdiv(seqlen_k, BLOCK_N)
    listed = tiles[0] + batch * tiles[1] + tile * tl.cast(2 * key_tiles, tl.int64)
    key_words = visited[0] + batch * visited[1]
    count_at = counts[0] + batch * counts[1] + tile * 3
    num_in, num_mixed, num_out = tl.load(count_at), tl.load(count_at + 1), tl.load(count_at + 2)
    whole = seqlen_k // BLOCK_N
    num_mixed -= key_tiles - whole
    plain = False
    if MODULATION != "mask":
        plain = tl.max((c != 0).to(tl.int32), 0) == 0
        num_in = tl.where(plain, whole, num_in)
        num_mixed = tl.where(plain, 0, num_mixed)
        num_out = tl.where(plain, 0, num_out)

    SUMS: tl.constexpr = 1 if k[0].dtype.element_ty == tl.float32 else 16
    empty = (
        tl.full([BLOCK_M], float("-inf"), tl.float32),
        tl.zeros([BLOCK_M, SUMS], tl.float32),
        zero_rows(BLOCK_M, PART_0, PART_1),
    )
    low = tl.full([BLOCK_M, 4], float("inf"), tl.float32)
    query = (rows, row_words, factor)
    source = (keys, values, key_words, k_order, batch, seqlen_k)
    matched, low = _attend(
        empty,
        low,
        query,
        source,
        listed,
        num_in,
        plain,
        MODULATION,
        PART_0,
        PART_1,
        HEAD_DIM,
        BLOCK_N,
        PRECISION,
    )
    states = (matched, empty)
    states, low = _attend_mixed(
        states,
        low,
        query,
        source,
        listed + key_tiles,
        num_mixed,
        MODULATION,
        PART_0,
        PART_1,
        HEAD_DIM,
        BLOCK_N,
        PRECISION,
    )
    if whole < key_tiles:
        tail, there = tokens_at(whole * BLOCK_N, k_order, batch, seqlen_k, BLOCK_N)
        states, low = _visit_mixed(
            states,
            low,
            query,
            source,
            whole * BLOCK_N,
            tail.to(tl.uint32),
            there,
            plain,
            True,
            MODULATION,
            PART_0,
            PART_1,
            HEAD_DIM,
            BLOCK_N,
            PRECISION,
        )
    matched, others = states
    in_max, in_sum, in_acc = matched
    parked = index * seqlen_q + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    PARKED: tl.constexpr = PART_0 + PART_1
    if parked_ptr is not None:
        store_rows(parked_ptr, PARKED, parked, exist, in_acc, PART_0, PART_1, PARKED)
    if MODULATION != "mask":
        others, low = _attend(
            others,
            low,
            query,
            source,
            listed + key_tiles - num_out,
            num_out,
            False,
            MODULATION,
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
    in_sum, out_sum = tl.max(in_sum, 1), tl.max(others[1], 1)
    matched = (in_max, in_sum)
    unmatched = (others[0], out_sum)
    low = tl.min(low, 1)
    share_in, share_out, lse, stats = _shares(matched, unmatched, low, c, sm_scale, plain, MODULATION)
    store_stats(lse, stats, lse_ptr, stats_ptr, index * seqlen_q + tokens, exist)
    share_in, share_out = share_in[:, None], share_out[:, None]
    first, second = in_acc
    if parked_ptr is not None:
        tl.debug_barrier()  # what one thread has parked another may fetch
        first = load_part(parked_ptr, PARKED, parked, exist, 0, PART_0, PARKED)
    first = first * share_in + others[2][0] * share_out
    base, stride = head_of(out, batch, head), row_stride(out)
    store_part(base, stride, tokens, exist, first, 0, PART_0, HEAD_DIM)
    if PART_1 > 0:
        if parked_ptr is not None:
            second = load_part(parked_ptr, PARKED, parked, exist, PART_0, PART_1, PARKED)
        second = second * share_in + others[2][1] * share_out
        store_part(base, stride, tokens, exist, second, PART_0, PART_1, HEAD_DIM)


@triton.jit
def _shares(matched, others, low, c, sm_scale, plain, MODULATION: tl.constexpr):
    """Shares of both states in the row, in the log domain, now that its extremes are known; lse and
    stats.
    """
    in_high, in_sum = matched
    out_high, out_sum = others
    tau = temperature(c, MODULATION)
    turned = tau < 0
    tau = tau * sm_scale
    factor = tau * LOG2_E
    high = tl.maximum(in_high, out_high)
    row_max, row_min = tl.where(turned, -low, high), tl.where(turned, -high, low)
    add_in, add_out, common = additions(c, sm_scale * row_max, sm_scale * row_min, MODULATION)
    in_anchor = finite_or_zero(tl.where(turned, -in_high, in_high))
    out_anchor = finite_or_zero(tl.where(turned, -out_high, out_high))
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
    anchor = finite_or_zero(tl.where(turned, row_min, row_max))
    offset_in = (anchor - in_anchor) * factor + below_in - log_sum
    offset_in = tl.where(in_sum == 0, float("-inf"), offset_in)
    offset_out = (anchor - out_anchor) * factor + below_out - log_sum
    offset_out = tl.where(out_sum == 0, float("-inf"), offset_out)
    offset_out = tl.where(plain, offset_in, offset_out)
    return weight_in * inverse, weight_out * inverse, lse, (row_max, row_min, offset_in, offset_out)
