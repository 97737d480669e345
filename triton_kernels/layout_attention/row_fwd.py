"""Layout attention forward where the whole row of scores is one tile.

Its keys come in two parts, as head dims do: 80 = 64 + 16. All keys of a first part exist. Without a
second its place is taken by the first's twin, which the compiler drops.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.records import store_stats
from dense_attn.triton_kernels.layout_attention.tiles import key_head_of, keys_of, rows_at
from dense_attn.triton_kernels.primitives import (
    LN_2,
    LOG2_E,
    add_product,
    additions,
    anchor_of,
    finite_or_zero,
    load_numbers,
    load_rows,
    products,
    scale_rows,
    store_rows,
    temperature,
    tile_of_program,
    tokens_at,
    words_at,
    zero_rows,
)

# The hardware's logarithm, one instruction for 22: half floats have far fewer digits than it.
LOG_2 = tl.constexpr("lg2.approx.ftz.f32 $0, $1;")


@triton.jit
def _keys_at(
    seqlen_k, FIRST: tl.constexpr, KEYS: tl.constexpr, LAST: tl.constexpr, COUNTED: tl.constexpr
):
    """KEYS keys from FIRST on; behind the last key it comes again, which changes no extreme. A
    sample that counts its keys may have none.
    """
    keys, exist = FIRST + tl.arange(0, KEYS), tl.full([KEYS], True, tl.int1)
    if LAST or COUNTED:
        keys = tl.minimum(keys, seqlen_k - 1)
    if COUNTED:
        exist = keys >= 0
    return keys.to(tl.int64), exist


@triton.jit
def _key_rows(
    x,
    batch,
    head,
    seqlen_k,
    KEYS_0: tl.constexpr,
    KEYS_1: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Rows of both parts of the keys of one head of x [B, H, N, D]."""
    keys, exist = _keys_at(seqlen_k, 0, KEYS_0, KEYS_1 == 0, COUNTED)
    first = load_rows(*rows_at(x, batch, head, keys), exist, PART_0, PART_1, HEAD_DIM)
    second = first
    if KEYS_1 > 0:
        keys, exist = _keys_at(seqlen_k, KEYS_0, KEYS_1, True, COUNTED)
        second = load_rows(*rows_at(x, batch, head, keys), exist, PART_0, PART_1, HEAD_DIM)
    return first, second


@triton.jit
def _scores(
    rows,
    keys,
    KEYS_1: tl.constexpr,
    NEGATE: tl.constexpr,
    PART_1: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Raw scores with both parts, as <q, k>, or minus that."""
    first = products(rows, keys[0], PART_1, PRECISION)
    second = first
    if KEYS_1 > 0:
        second = products(rows, keys[1], PART_1, PRECISION)
    if NEGATE:
        first, second = -first, -second
    return first, second


@triton.jit
def _meets(
    row_words,
    k_words,
    batch,
    seqlen_k,
    KEYS_0: tl.constexpr,
    KEYS_1: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Which pairs are matched, of both parts."""
    keys, exist = _keys_at(seqlen_k, 0, KEYS_0, KEYS_1 == 0, COUNTED)
    first = (row_words[:, None] & words_at(k_words, batch, keys, exist)[None, :]) != 0
    second = first
    if KEYS_1 > 0:
        keys, exist = _keys_at(seqlen_k, KEYS_0, KEYS_1, True, COUNTED)
        second = (row_words[:, None] & words_at(k_words, batch, keys, exist)[None, :]) != 0
    return first, second


@triton.jit
def _folded(x, KEYS: tl.constexpr):
    """[rows, several * KEYS] as [rows, several, KEYS], which one thread reduces to [rows, KEYS]."""
    return tl.reshape(x, [x.shape[0], x.shape[1] // KEYS, KEYS])


@triton.jit
def _highest(parts, KEYS_1: tl.constexpr):
    """The largest number of each row, in both parts."""
    highest = parts[0]
    if KEYS_1 > 0:
        highest = tl.maximum(tl.max(_folded(highest, KEYS_1), 1), parts[1])
    return tl.max(highest, 1)


@triton.jit
def _lowest(parts, KEYS_1: tl.constexpr):
    """The smallest number of each row, in both parts."""
    lowest = parts[0]
    if KEYS_1 > 0:
        lowest = tl.minimum(tl.min(_folded(lowest, KEYS_1), 1), parts[1])
    return tl.min(lowest, 1)


@triton.jit
def _total(parts, KEYS_1: tl.constexpr):
    """The sum of each row, over both parts."""
    total = parts[0]
    if KEYS_1 > 0:
        total = tl.sum(_folded(total, KEYS_1), 1) + parts[1]
    return tl.sum(total, 1)


@triton.jit
def _exponents(raw, meets, row, MODULATION: tl.constexpr, EXACT: tl.constexpr):
    """raw*factor + addition, from an anchor if the difference must not be rounded late; scores of
    "mask" are selected before.
    """
    factor, anchor, add_in, add_out = row
    addition = add_in[:, None]
    if MODULATION != "mask":
        addition = tl.where(meets, addition, add_out[:, None])
    return tl.fma(raw - anchor[:, None] if EXACT else raw, factor[:, None], addition)


@triton.jit
def _weights(
    raw,
    meets,
    row,
    seqlen_k,
    KEYS_1: tl.constexpr,
    MODULATION: tl.constexpr,
    EXACT: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Weights of both parts, at most 1, and the exponent that they are measured from, of rows."""
    factor, anchor, add_in, add_out = row
    if not EXACT:  # one fused multiply-add a score
        row = (factor, anchor, add_in - anchor * factor, add_out - anchor * factor)
    first = _exponents(raw[0], meets[0], row, MODULATION, EXACT)
    second = _exponents(raw[1], meets[1], row, MODULATION, EXACT)
    largest = tl.zeros_like(anchor)
    if MODULATION != "mask":
        largest = finite_or_zero(_highest((first, second), KEYS_1))
    if EXACT:  # taken off before the sum, which would round the distances off
        row = (factor, anchor, add_in - largest, add_out - largest)
        first = _exponents(raw[0], meets[0], row, MODULATION, EXACT)
        second = _exponents(raw[1], meets[1], row, MODULATION, EXACT)
    elif MODULATION != "mask":
        first, second = first - largest[:, None], second - largest[:, None]
    first, second = tl.exp2(first), tl.exp2(second)
    if COUNTED:
        first = tl.where((tl.arange(0, raw[0].shape[1]) < seqlen_k)[None, :], first, 0.0)
    # Without counts only the last part has keys that come again.
    SECOND: tl.constexpr = raw[1].shape[1]
    there = raw[0].shape[1] * (KEYS_1 > 0) + tl.arange(0, SECOND) < seqlen_k
    second = tl.where(there[None, :], second, 0.0)
    if KEYS_1 == 0:
        first = second
    return first, second, largest


@triton.jit
def _store_numbers(numbers, lse_ptr, stats_ptr, at, PTX: tl.constexpr):
    """lse and statistics of rows, where they are asked for."""
    row_sum, empty, largest, row, common, tau, extremes = numbers
    _, anchor, add_in, add_out = row
    if PTX:
        log_sum = tl.inline_asm_elementwise(LOG_2, "=f,f", [row_sum], tl.float32, True, 1)
    else:
        log_sum = tl.log2(row_sum)
    lse = tl.where(empty, float("-inf"), (largest + log_sum) * LN_2 + anchor * tau + common)
    offsets = add_in - largest - log_sum, add_out - largest - log_sum
    stats = (extremes[0], extremes[1], offsets[0], offsets[1])
    store_stats(lse, stats, lse_ptr, stats_ptr, *at)


@triton.jit
def layout_attention_row_fwd_kernel(
    q,
    k,
    v,
    q_words,
    k_words,
    strength,  # (pointer, strides)
    out,
    lse_ptr,  # or None
    stats_ptr,  # or None
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
    PTX: tl.constexpr,
    GROUP: tl.constexpr = 1,
    seqlens=None,
):
    """One tile of query rows against all keys, which fit one tile: no state, no lists."""
    KEYS_0: tl.constexpr = 64 if BLOCK_N > 64 else BLOCK_N
    KEYS_1: tl.constexpr = BLOCK_N - KEYS_0
    index, tile, batch, head = tile_of_program(num_heads, seqlen_q, BLOCK_M)
    tokens, exist = tokens_at(tile * BLOCK_M, None, batch, seqlen_q, BLOCK_M)
    rows = load_rows(*rows_at(q, batch, head, tokens), exist, PART_0, PART_1, HEAD_DIM)
    COUNTED: tl.constexpr = seqlens is not None
    own, seqlen_k = key_head_of(head, GROUP), keys_of(seqlens, batch, seqlen_k)
    keys = _key_rows(k, batch, own, seqlen_k, KEYS_0, KEYS_1, PART_0, PART_1, HEAD_DIM, COUNTED)
    values = _key_rows(v, batch, own, seqlen_k, KEYS_0, KEYS_1, PART_0, PART_1, HEAD_DIM, COUNTED)
    raw = _scores(rows, keys, KEYS_1, NEGATE, PART_1, PRECISION)
    # Words are read behind the products, which need the registers before.
    c = load_numbers(strength, batch, head, tokens, exist)
    row_words = words_at(q_words, batch, tokens, exist)
    meets = _meets(row_words, k_words, batch, seqlen_k, KEYS_0, KEYS_1, COUNTED)
    if MODULATION == "mask":
        raw = tl.where(meets[0], raw[0], float("-inf")), tl.where(meets[1], raw[1], float("-inf"))
        sm_scale = tl.maximum(sm_scale, 1e-30)  # 0 times -inf would be no number
    row_max = _highest(raw, KEYS_1)
    row_min = _lowest(raw, KEYS_1) if MODULATION == "range" else row_max
    tau = temperature(c, MODULATION) * sm_scale
    add_in, add_out, common = additions(c, sm_scale * row_max, sm_scale * row_min, MODULATION)
    add_in, add_out = add_in * LOG2_E, add_out * LOG2_E
    anchor = anchor_of(row_max, row_min, tau, MODULATION)
    row = (tau * LOG2_E, anchor, add_in, add_out)
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    first, second, largest = _weights(raw, meets, row, seqlen_k, KEYS_1, MODULATION, EXACT, COUNTED)
    row_sum = _total((first, second), KEYS_1)
    # A row without keys is nothing, and has offsets of -inf, so that it weighs nothing.
    empty = row_sum == 0
    row_sum = tl.where(empty, float("inf"), row_sum)

    rows_at_once = index * seqlen_q + tokens, exist
    numbers = row_sum, empty, largest, row, common, tau, (row_max, row_min)
    if not EXACT:  # less waits in registers before the last products, of float32 behind them
        _store_numbers(numbers, lse_ptr, stats_ptr, rows_at_once, PTX)
    acc = zero_rows(BLOCK_M, PART_0, PART_1)
    acc = add_product(acc, first.to(v[0].dtype.element_ty), values[0], PART_1, PRECISION)
    if KEYS_1 > 0:
        acc = add_product(acc, second.to(v[0].dtype.element_ty), values[1], PART_1, PRECISION)
    acc = scale_rows(acc, 1 / row_sum, PART_1)
    store_rows(*rows_at(out, batch, head, tokens), exist, acc, PART_0, PART_1, HEAD_DIM)
    if EXACT:
        _store_numbers(numbers, lse_ptr, stats_ptr, rows_at_once, False)
