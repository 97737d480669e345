"""Layout attention forward: key tiles whose pairs are all matched, then those that hold both
populations, then those without a match.

Scores stay raw, as <q, k>, until they meet exp2: `factor` carries the temperature, the scale and
log2(e). The signs of both are in q's rows, so that the score that weighs most, from which exponents
are measured, is always the largest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.fwd_steps import (
    BY_PRODUCT,
    BY_THREAD,
    LEAST_FACTOR,
    absorb,
    lower,
    of_samples,
    row_sums,
    rows_of,
    shares_of,
    tokens_of_tile,
    visit_mixed,
)
from dense_attn.triton_kernels.layout_attention.records import store_stats
from dense_attn.triton_kernels.layout_attention.tiles import key_head_of, keys_of
from dense_attn.triton_kernels.primitives import (
    LOG2_E,
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
    tile_in_turn,
    tokens_at,
    words_at,
    zero_rows,
)


@triton.jit
def _attend(
    state,
    low,
    query,
    source,
    listed,
    MODULATION: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax over listed tiles whose pairs are all of one population, or over the first
    where all are plain.
    """
    tiles, count, plain = listed
    exist, places = tl.full([BLOCK_N], True, tl.int1), tl.arange(0, BLOCK_N)
    tile, soon = _tile(tiles, 0, count, plain), _tile(tiles + 1, 1, count, plain)
    tokens = tokens_of_tile(source, tile, tl.where(count > 0, places, 0), BLOCK_N)
    for place in range(count):
        # Tokens are known a round before their keys are fetched, and the tile two rounds before:
        # the compiler fetches ahead only what waits for no other load of the same round.
        here, tokens = tokens, tokens_of_tile(source, soon, places, BLOCK_N)
        tiles += 1
        soon = _tile(tiles + 1, place + 2, count, plain)
        keys = rows_of(source[0], here, exist, PART_0, PART_1, HEAD_DIM)
        raw = products(query[0], keys, PART_1, PRECISION)
        low = lower(low, raw, MODULATION)
        values = rows_of(source[1], here, exist, PART_0, PART_1, HEAD_DIM)
        state = absorb(state, raw, values, exist, query[2], False, PART_1, PRECISION)
    return state, low


@triton.jit
def _attend_mixed(
    states,
    low,
    query,
    source,
    listed,
    MODULATION: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of both populations over listed tiles in doubt, and over the tile that the
    keys end in.
    """
    tiles, count, plain = listed
    exist, places = tl.full([BLOCK_N], True, tl.int1), tl.arange(0, BLOCK_N)
    tile, soon = _tile(tiles, 0, count, False), _tile(tiles + 1, 1, count, False)
    tokens = tokens_of_tile(source, tile, tl.where(count > 0, places, 0), BLOCK_N)
    for place in range(count):
        here, tokens = tokens, tokens_of_tile(source, soon, places, BLOCK_N)
        words = tl.load(source[2] + tile * BLOCK_N + places)
        keys = (here, words, exist)
        tiles += 1
        # Loaded twice, since a value carried over two rounds keeps a loop from being pipelined.
        tile = _tile(tiles, place + 1, count, False)
        soon = _tile(tiles + 1, place + 2, count, False)
        states, low = visit_mixed(
            states, low, query, source, keys, False, MODULATION, PART_0, PART_1, HEAD_DIM, PRECISION
        )
    whole, left = source[5] // BLOCK_N, source[5] % BLOCK_N
    if left > 0:
        exist, places = places < left, tl.minimum(places, left - 1)
        words = tl.load(source[2] + whole * BLOCK_N + places)
        tokens = tokens_of_tile(source, whole, places, BLOCK_N)
        keys = (tokens, tl.where(plain, -1, words), exist)
        query = (query[0], tl.where(plain, -1, query[1]), query[2])
        states, low = visit_mixed(
            states, low, query, source, keys, True, MODULATION, PART_0, PART_1, HEAD_DIM, PRECISION
        )
    return states, low


@triton.jit
def _tile(at, place, count, plain):
    """The tile at a place of a list, the place itself where all are plain; 0 behind the end."""
    tile = tl.load(at, mask=place < count, other=0)
    return tl.where(plain, tl.where(place < count, place, 0), tile)


@triton.jit
def _signed_rows(
    q,
    out,
    batch,
    head,
    tokens,
    exist,
    turned,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Rows of q, negated where they are turned: by way of the rows of the output, since the matrix
    unit reads from shared memory only what comes straight from a load.
    """
    base, stride = head_of(q, batch, head), row_stride(q)
    own, own_stride = head_of(out, batch, head), row_stride(out)
    some = tl.max(turned.to(tl.int32), 0) != 0
    if some:
        rows = load_rows(base, stride, tokens, exist, PART_0, PART_1, HEAD_DIM)
        rows = scale_rows(rows, tl.where(turned, -1.0, 1.0), PART_1)
        store_rows(own, own_stride, tokens, exist, rows, PART_0, PART_1, HEAD_DIM)
        tl.debug_barrier()  # what one thread has stored another may fetch
    base, stride = tl.where(some, own, base), tl.where(some, own_stride, stride)
    return load_rows(base, stride, tokens, exist, PART_0, PART_1, HEAD_DIM)


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
    lse_ptr,  # or None
    stats_ptr,  # or None
    # float32 [B, H, M, PART_0 + PART_1] where the matched keys' accumulator waits, or None
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
    GROUP: tl.constexpr = 1,
    seqlens=None,
):
    """One tile of query rows: a state for matched keys and one for the others, and the merge of
    both. Where no row has a strength all keys are matched.
    """
    WIDTH: tl.constexpr = HEAD_DIM * k[0].dtype.element_ty.primitive_bitwidth // 8
    index, tile, batch, head = tile_in_turn(num_heads, seqlen_q, seqlen_k, WIDTH, BLOCK_M)
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    row_words = words_at(q_words, batch, tokens, exist)
    c = load_numbers(strength, batch, head, tokens, exist)
    tau = temperature(c, MODULATION)
    factor = tl.maximum(tl.abs(tau) * sm_scale * LOG2_E, LEAST_FACTOR)
    if MODULATION == "range" or NEGATE:
        turned = (tau < 0) != NEGATE
        rows = _signed_rows(q, out, batch, head, tokens, exist, turned, PART_0, PART_1, HEAD_DIM)
    else:
        rows = load_head(q, batch, head, tokens, exist, PART_0, PART_1, HEAD_DIM)
    key_head, keys_there = key_head_of(head, GROUP), keys_of(seqlens, batch, seqlen_k)
    keys = (head_of(k, batch, key_head), k[3], k[4])
    values = (head_of(v, batch, key_head), v[3], v[4])
    source = (keys, values, visited[0] + batch * visited[1], k_order, batch, keys_there)
    key_tiles, whole = tl.cdiv(seqlen_k, BLOCK_N), keys_there // BLOCK_N
    tiles_at = tiles[0] + batch * tiles[1] + tile * tl.cast(2 * key_tiles, tl.int64)
    count_at = counts[0] + batch * counts[1] + tile * 3
    count, plain = tl.load(count_at), False
    if MODULATION != "mask":
        plain = tl.max((c != 0).to(tl.int32), 0) == 0
        count = tl.where(plain, whole, count)

    # Wider accumulators leave neither the registers nor the matrix unit's time.
    NARROW: tl.constexpr = k[0].dtype.element_ty != tl.float32 and PART_0 + PART_1 <= 64
    sums = tl.zeros([BLOCK_M, BY_PRODUCT if NARROW else BY_THREAD], tl.float32)
    least = tl.full([BLOCK_M], float("-inf"), tl.float32)
    empty = (least, sums, zero_rows(BLOCK_M, PART_0, PART_1))
    low = tl.full([BLOCK_M, BY_THREAD], float("inf"), tl.float32)
    query = (rows, row_words, factor)
    listed = (tiles_at, count, plain)
    matched, low = _attend(
        empty, low, query, source, listed, MODULATION, PART_0, PART_1, HEAD_DIM, BLOCK_N, PRECISION
    )
    # Counts are read where they are needed, so that the loops before need not carry them.
    count = tl.where(plain, 0, tl.load(count_at + 1) - (tl.cdiv(keys_there, BLOCK_N) - whole))
    states, listed = (matched, empty), (tiles_at + key_tiles, count, plain)
    states, low = _attend_mixed(
        states, low, query, source, listed, MODULATION, PART_0, PART_1, HEAD_DIM, BLOCK_N, PRECISION
    )
    matched, others = states
    in_max, in_sum, in_acc = matched
    parked = index * seqlen_q + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    PARKED: tl.constexpr = PART_0 + PART_1
    if parked_ptr is not None:
        store_rows(parked_ptr, PARKED, parked, exist, in_acc, PART_0, PART_1, PARKED)
    if MODULATION != "mask":
        count = tl.where(plain, 0, tl.load(count_at + 2))
        listed = (tiles_at + key_tiles - count, count, False)
        others, low = _attend(
            others,
            low,
            query,
            source,
            listed,
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
    in_sum, out_sum = row_sums(in_sum), row_sums(others[1])
    tops = of_samples((in_max, in_sum, others[0], out_sum, tl.min(low, 1)), seqlens, keys_there)
    share_in, share_out, lse, stats = shares_of(tops, c, sm_scale, plain, MODULATION)
    store_stats(lse, stats, lse_ptr, stats_ptr, index * seqlen_q + tokens, exist)
    share_in, share_out = share_in[:, None], share_out[:, None]
    first, second = in_acc
    if parked_ptr is not None:
        tl.debug_barrier()  # what one thread has parked another may fetch
        first = load_part(parked_ptr, PARKED, parked, exist, 0, PART_0, PARKED)
    first = first * share_in + others[2][0] * share_out
    at, stride = head_of(out, batch, head), row_stride(out)
    store_part(at, stride, tokens, exist, first, 0, PART_0, HEAD_DIM)
    if PART_1 > 0:
        if parked_ptr is not None:
            second = load_part(parked_ptr, PARKED, parked, exist, PART_0, PART_1, PARKED)
        second = second * share_in + others[2][1] * share_out
        store_part(at, stride, tokens, exist, second, PART_0, PART_1, HEAD_DIM)
