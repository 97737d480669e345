"""Steps of a tile in layout attention forward, and the merge of its two states.

A state is (maximum, sums of weights, accumulator) of rows; its scores are raw, as <q, k>, and the
largest weighs most: signs of the scale and the temperature are in q.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import (
    LN_2,
    LOG2_E,
    add_product,
    additions,
    finite_or_zero,
    load_rows,
    products,
    scale_rows,
    temperature,
)

# At a temperature of 0 a masked score of -inf must still weigh 0, not exp2(-inf * 0).
LEAST_FACTOR = tl.constexpr(2.0**-126)
# Columns of a running sum of weights: equal ones that the matrix unit fills, or a part for each of
# the threads that share a row.
BY_PRODUCT = tl.constexpr(16)
BY_THREAD = tl.constexpr(4)


@triton.jit
def tokens_of_tile(source, tile, places, BLOCK_N: tl.constexpr):
    """The tokens at places of a tile of keys; an order leads to no other memory."""
    order, batch, seqlen_k = source[3], source[4], source[5]
    if order is None:
        tokens = tile * BLOCK_N + places
    else:
        at = order[0] + batch * order[1] + places * order[2]
        tokens = tl.load(at + tile * tl.cast(BLOCK_N * order[2], tl.int64))
    # One comparison: as an unsigned number what is negative is large.
    return tl.minimum(tokens.to(tl.uint32, bitcast=True), tl.cast(seqlen_k - 1, tl.uint32))


@triton.jit
def rows_of(x, tokens, exist, PART_0: tl.constexpr, PART_1: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Both parts of rows of a head: x is its pointer, the stride of its rows in grains, the
    grain.
    """
    if x[2] == 1:
        grains = tokens.to(tl.int64) * x[1]
    else:  # the launcher sees to it that they fit
        grains = (tokens * tl.cast(x[1], tl.uint32)).to(tl.int64)
    return load_rows(x[0], x[2], grains, exist, PART_0, PART_1, HEAD_DIM)


@triton.jit
def visit_mixed(
    states,
    low,
    query,
    source,
    tile,
    ENDS: tl.constexpr,
    MODULATION: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile that may hold both populations; where the keys end in it, copies of the last fill
    it, which weigh nothing.
    """
    matched, others = states
    q, q_words, factor = query
    tokens, words, exist = tile
    every = tl.full(exist.shape, True, tl.int1)
    keys = rows_of(source[0], tokens, every, PART_0, PART_1, HEAD_DIM)
    raw = products(q, keys, PART_1, PRECISION)
    low = lower(low, raw, MODULATION)
    meets = (q_words[:, None] & words[None, :]) != 0
    values = rows_of(source[1], tokens, exist, PART_0, PART_1, HEAD_DIM)
    inside = tl.where(meets, raw, float("-inf"))
    matched = absorb(matched, inside, values, exist, factor, ENDS, PART_1, PRECISION)
    if MODULATION != "mask":
        outside = tl.where(meets, float("-inf"), raw)
        others = absorb(others, outside, values, exist, factor, ENDS, PART_1, PRECISION)
    return (matched, others), low


@triton.jit
def lower(low, raw, MODULATION: tl.constexpr):
    """Running minima, a part for each of the threads that share a row."""
    if MODULATION == "range":
        low = tl.minimum(low, tl.min(tl.min(_by_thread(raw), 3), 1))
    return low


@triton.jit
def _by_thread(scores):
    """[rows, keys / 8, BY_THREAD, 2]: of a product on NVIDIA's a thread holds all of the second and
    of the last axis, so that reducing them asks no other.
    """
    return tl.reshape(scores, [scores.shape[0], scores.shape[1] // 8, BY_THREAD, 2])


@triton.jit
def absorb(
    state,
    scores,
    values,
    exist,
    factor,
    ENDS: tl.constexpr,
    PART_1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over the scores of a tile; those of -inf weigh nothing."""
    before, row_sum, acc = state
    EXACT: tl.constexpr = values[0].dtype == tl.float32
    row_max = tl.maximum(before, tl.max(scores, 1))
    anchor = finite_or_zero(row_max)
    alpha = _weights(before[:, None], anchor, factor, EXACT)
    weights = _weights(scores, anchor, factor, EXACT)
    halves = weights.to(values[0].dtype)
    if row_sum.shape[1] == BY_PRODUCT:
        ones = tl.full([weights.shape[1], BY_PRODUCT], 1.0, halves.dtype)
        ones = tl.where(exist[:, None], ones, 0.0) if ENDS else ones
        row_sum = tl.dot(halves, ones, row_sum * alpha)
    else:
        weights = tl.where(exist[None, :], weights, 0.0) if ENDS else weights
        by_thread = _by_thread(tl.broadcast_to(alpha, [alpha.shape[0], 8]))
        row_sum *= tl.max(tl.max(by_thread, 3), 1)
        row_sum += tl.sum(tl.sum(_by_thread(weights), 3), 1)
    acc = scale_rows(acc, tl.reshape(alpha, [alpha.shape[0]]), PART_1)
    return row_max, row_sum, add_product(acc, halves, values, PART_1, PRECISION)


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
def row_sums(row_sum):
    """The sums of rows from their columns, equal or in parts."""
    if row_sum.shape[1] == BY_PRODUCT:
        row_sum = row_sum / BY_PRODUCT
    return tl.sum(row_sum, 1)


@triton.jit
def of_samples(tops, seqlens, keys):
    """The extremes and sums of rows; without keys a sample has no extremes, and they are 0."""
    if seqlens is not None:
        in_max, in_sum, out_max, out_sum, low = tops
        in_max, out_max = tl.where(keys == 0, 0.0, in_max), tl.where(keys == 0, 0.0, out_max)
        tops = in_max, in_sum, out_max, out_sum, tl.where(keys == 0, 0.0, low)
    return tops


@triton.jit
def shares_of(tops, c, sm_scale, plain, MODULATION: tl.constexpr):
    """Shares of both states in the row, in the log domain, now that its extremes are known; lse and
    stats.
    """
    in_max, in_sum, out_max, out_sum, low = tops
    tau = temperature(c, MODULATION)
    turned = tau < 0
    tau = tau * sm_scale
    factor = tau * LOG2_E
    # Back to the raw scores of rows whose sign was in q.
    high = tl.maximum(in_max, out_max)
    row_max, row_min = tl.where(turned, -low, high), tl.where(turned, -high, low)
    add_in, add_out, common = additions(c, sm_scale * row_max, sm_scale * row_min, MODULATION)
    in_anchor = finite_or_zero(tl.where(turned, -in_max, in_max))
    out_anchor = finite_or_zero(tl.where(turned, -out_max, out_max))
    # Of the matched keys' heaviest.
    lead = (in_anchor - out_anchor) * factor + (add_in - add_out) * LOG2_E
    below_in = tl.where(out_sum == 0, 0.0, tl.where(lead >= 0, 0.0, lead))
    below_out = tl.where(in_sum == 0, add_out, tl.where(lead <= 0, 0.0, -lead))
    weight_in = tl.where(in_sum == 0, 0.0, tl.exp2(below_in))
    weight_out = tl.where(out_sum == 0, 0.0, tl.exp2(below_out))

    row_sum = in_sum * weight_in + out_sum * weight_out
    if MODULATION == "range":  # 0 times an infinite score is no number
        row_sum += tl.where(tau == 0, tau * (row_max - row_min), 0.0)
    inverse = tl.where(row_sum == 0, 0.0, 1 / row_sum)
    heaviest = tl.where((in_sum != 0) & (below_in >= 0), in_anchor * tau + add_in, out_anchor * tau)
    log_sum = tl.log2(row_sum)
    lse = tl.where(row_sum == 0, float("-inf"), heaviest + log_sum * LN_2 + common)
    anchor = finite_or_zero(tl.where(turned, row_min, row_max))
    offset_in = (anchor - in_anchor) * factor + below_in - log_sum
    offset_in = tl.where(in_sum == 0, float("-inf"), offset_in)
    offset_out = (anchor - out_anchor) * factor + below_out - log_sum
    offset_out = tl.where(out_sum == 0, float("-inf"), offset_out)
    # The others were counted as matched, but for those of a last tile with nothing before it.
    offset_out = tl.where(plain & (in_sum != 0), offset_in, offset_out)
    return weight_in * inverse, weight_out * inverse, lse, (row_max, row_min, offset_in, offset_out)
