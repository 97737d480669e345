"""Layout attention backward, the pass over key tiles, which takes what the first has found."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.records import (
    LISTED,
    NUM_NUMBERS,
    NUM_PLACES,
    THROUGH_MAX,
    lift_of,
    load_records,
    places_of_columns,
    weights_of,
)
from dense_attn.triton_kernels.layout_attention.tiles import (
    add_tokens,
    key_head_of,
    keys_of,
    listed_tiles,
    rows_at,
    tile_at,
)
from dense_attn.triton_kernels.primitives import (
    LN_2,
    LOG2_E,
    add_product,
    load_head,
    load_rows,
    meeting,
    plus_bits,
    products,
    scale_rows,
    store_head,
    tile_of_program,
    tokens_at,
    tokens_of,
    words_at,
    zero_rows,
)

SCANNED = tl.constexpr(2048)  # extremes that are looked through at once


@triton.jit
def _share(count, SPLITS: tl.constexpr):
    """The part of `count` things that is this program's, of SPLITS that share them: (beginning,
    end), none where they are fewer.
    """
    begin, end = 0, count
    if SPLITS > 1:
        split, each = tl.program_id(1), tl.cast(count, tl.int64)
        begin = (each * split // SPLITS).to(tl.int32)
        end = (each * (split + 1) // SPLITS).to(tl.int32)
    return begin, end


@triton.jit
def _list_extremes(places, listed, own, count, first, BLOCK_N: tl.constexpr):
    """Lists which extremes from `own` up to `count` are at a tile of keys, where their lists of the
    tiles before end: (beginning, number of them).
    """
    at = tl.arange(0, SCANNED)
    before = tl.zeros([SCANNED], tl.int32)
    for start in tl.range(own, count, SCANNED, num_stages=1):
        key = tl.load(places + start + at, mask=start + at < count, other=2147483647)
        before += (key < first).to(tl.int32)
    begin = own + tl.sum(before)
    number = tl.zeros_like(begin)
    for start in tl.range(own, count, SCANNED, num_stages=1):
        key = tl.load(places + start + at, mask=start + at < count, other=2147483647)
        here = (key >= first) & (key < first + BLOCK_N)
        place = begin + number + tl.cumsum(here.to(tl.int32), 0) - 1
        tl.store(listed + place, start + at, mask=here)
        number += tl.sum(here.to(tl.int32))
    tl.debug_barrier()  # what one thread has listed another fetches
    return begin, number


@triton.jit
def _add_extremes(
    acc,
    q,
    batch,
    head,
    through,
    places,
    listed,
    factor,
    first,
    seqlen_q,
    MODULATION: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """acc plus the gradients through rows' largest and smallest scores that are at a tile of keys.

    A row has two of them among all keys: a list of those that are here spares every tile of scores
    two comparisons a score.
    """
    count = seqlen_q * 2 if MODULATION == "range" else seqlen_q
    GATHERED: tl.constexpr = 64 if PART_0 + PART_1 < 128 else 16  # as registers allow
    own, end = _share(count, SPLITS)
    begin, number = _list_extremes(places, listed, own, end, first, BLOCK_N)
    keys = first + tl.arange(0, BLOCK_N)
    for start in tl.range(0, number, GATHERED, num_stages=1):
        place = start + tl.arange(0, GATHERED)
        exist = place < number
        at = tl.load(listed + begin + place, mask=exist, other=0)
        key = tl.load(places + at, mask=exist, other=-1)
        gradient = factor * tl.load(through + at, mask=exist, other=0.0)
        rows = load_head(q, batch, head, at % seqlen_q, exist, PART_0, PART_1, HEAD_DIM)
        grad = tl.where(keys[:, None] == key[None, :], gradient[None, :], 0.0)
        acc = add_product(acc, grad.to(rows[0].dtype), rows, PART_1, PRECISION)
    return acc


@triton.jit
def _weights(
    raw,
    key_words,
    numbers,
    one,
    MODULATION: tl.constexpr,
    APART: tl.constexpr,
    EXACT: tl.constexpr,
):
    """The softmax's weights [keys, rows] from raw scores, keys' words and numbers of rows."""
    factor, add_out, gap, row_words, _, anchor = numbers
    if APART and not EXACT:
        meets = (key_words[:, None] & row_words[None, :]) != 0
        of_rows = factor, anchor, add_out  # whose place additions to matched scores have
        weights = _weights_apart(raw, meets, of_rows, raw.shape[0], raw.shape[1])
        if MODULATION == "mask":  # whatever the scores of others are
            weights = tl.where(meets, weights, 0.0)
    else:
        meets = meeting(key_words[:, None], row_words[None, :], one)
        offsets = plus_bits(add_out[None, :], gap[None, :], meets)
        weights = weights_of(raw, factor[None, :], anchor[None, :], offsets, EXACT)
        if MODULATION == "mask":
            weights = (weights.to(tl.int32, bitcast=True) * meets).to(tl.float32, bitcast=True)
    return weights


@triton.jit
def _weights_apart(raw, meets, numbers, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """The softmax's weights [keys, rows] from raw scores and which of them are matched; each second
    row apart, since of more conditions side by side LLVM makes masks of bits.
    """
    factor, add_in, add_out = numbers
    even, odd = _alternate(raw, KEYS, ROWS)
    even_meets, odd_meets = _alternate(meets, KEYS, ROWS)
    even_factor, odd_factor = _alternate(factor, 1, ROWS)
    even_in, odd_in = _alternate(add_in, 1, ROWS)
    even_out, odd_out = _alternate(add_out, 1, ROWS)
    even = weights_of(even, even_factor, None, tl.where(even_meets, even_in, even_out), False)
    odd = weights_of(odd, odd_factor, None, tl.where(odd_meets, odd_in, odd_out), False)
    return tl.reshape(tl.join(even, odd), [KEYS, ROWS])


@triton.jit
def _of_keys(rows, left, PART_1: tl.constexpr):
    """Rows in parts of the `left` first keys; 0 for those behind, whatever they hold."""
    there = (tl.arange(0, rows[0].shape[0]) < left)[:, None]
    first, second = tl.where(there, rows[0], 0.0), rows[1]
    if PART_1 > 0:
        second = tl.where(there, second, 0.0)
    return first, second


@triton.jit
def _alternate(x, KEYS: tl.constexpr, ROWS: tl.constexpr):
    """Each second row of x [keys, rows] from the first on, and the others."""
    return tl.split(tl.reshape(x, [KEYS, ROWS // 2, 2]))


@triton.jit
def layout_attention_bwd_kv_kernel(
    grad_out,
    q,
    k,
    v,
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
    APART: tl.constexpr,
    AHEAD: tl.constexpr,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    PRECISION: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr = 1,
    SPLITS: tl.constexpr = 1,
    seqlens=None,
):
    """One tile of keys against all query rows, or one of SPLITS shares of its tiles of them: dk and
    dv, those of each head of queries and of each share apart.
    """
    EXACT: tl.constexpr = q[0].dtype.element_ty == tl.float32
    index, tile, batch, head = tile_of_program(num_heads, seqlen_k, BLOCK_N)
    keys, stored = tokens_at(tile * BLOCK_N, k_order, batch, seqlen_k, BLOCK_N)
    there, own, left = stored, key_head_of(head, GROUP), BLOCK_N
    if seqlens is not None:
        left = keys_of(seqlens, batch, seqlen_k) - tile * BLOCK_N
        there = tl.arange(0, BLOCK_N) < left
    acc_k, acc_v = zero_rows(BLOCK_N, PART_0, PART_1), zero_rows(BLOCK_N, PART_0, PART_1)
    records = numbers_ptr + index * NUM_NUMBERS * seqlen_q
    columns = load_head(k, batch, own, keys, there, PART_0, PART_1, HEAD_DIM)
    values = load_head(v, batch, own, keys, there, PART_0, PART_1, HEAD_DIM)
    key_words = words_at(k_words, batch, keys, there)
    one = tl.cast(tl.minimum(seqlen_k, 1), tl.int32)
    query_tiles = tl.cdiv(seqlen_q, BLOCK_M)
    listed, num_whole, count = listed_tiles(tiles, counts, batch, tile, query_tiles)
    if seqlens is not None:
        count = tl.where(left > 0, count, 0)
    begin, end = _share(count, SPLITS)
    columns_at, last = places_of_columns(BLOCK_M), tl.maximum(end - 1, 0)
    now = tl.where(count > 0, tile_at(listed, query_tiles, begin, num_whole, tiles), 0)
    soon = tile_at(listed, query_tiles, tl.minimum(begin + 1, last), num_whole, tiles)
    tokens, exist = tokens_of(now * BLOCK_M + columns_at, q_order, batch, seqlen_q)
    for place in range(begin, end):
        first = (place if tiles is None and SPLITS > 1 else now) * BLOCK_M  # one register for both
        here, there_are = tokens, exist
        if tiles is None:
            here, there_are = tokens_of(first + columns_at, q_order, batch, seqlen_q)
            now += 1  # not `place`, of which the compiler makes one of 64 bits
        else:  # known ahead, tokens a tile and tiles two: no copy waits for its own place
            tokens, exist = tokens_of(soon * BLOCK_M + columns_at, q_order, batch, seqlen_q)
            # Loaded twice, since a value carried over two rounds keeps a loop from being pipelined.
            now = tile_at(listed, query_tiles, tl.minimum(place + 1, last), num_whole, tiles)
            soon = tile_at(listed, query_tiles, tl.minimum(place + 2, last), num_whole, tiles)
        q_rows, grad_rows = rows_at(q, batch, head, here), rows_at(grad_out, batch, head, here)
        rows = load_rows(*q_rows, there_are, PART_0, PART_1, HEAD_DIM)
        grads = load_rows(*grad_rows, there_are, PART_0, PART_1, HEAD_DIM)
        numbers = load_records(records, first, seqlen_q, BLOCK_M)
        factor, shift = numbers[0], numbers[4]
        raw = products(columns, rows, PART_1, PRECISION)  # [keys, rows]
        raw = -raw if NEGATE else raw
        # Rows that do not exist have zeros for gradients; keys that do not exist are not stored.
        weights = _weights(raw, key_words, numbers, one, MODULATION, APART, EXACT)
        of_grads = grads, grad_rows, there_are
        acc_v = add_tokens(acc_v, weights, of_grads, PART_0, PART_1, HEAD_DIM, PRECISION, AHEAD)
        slope = products(values, grads, PART_1, PRECISION)
        grad = weights * tl.fma(slope, factor[None, :], shift[None, :])  # ds' times the factor
        of_rows = rows, q_rows, there_are
        acc_k = add_tokens(acc_k, grad, of_rows, PART_0, PART_1, HEAD_DIM, PRECISION, AHEAD)
    lift, nothing = lift_of(sm_scale, q[0].dtype.element_ty), tl.zeros([BLOCK_N], tl.float32)
    acc_v = scale_rows(acc_v, nothing + tl.exp2(-lift), PART_1)
    if seqlens is not None:
        acc_v = _of_keys(acc_v, left, PART_1)
    into = head * SPLITS + tl.program_id(1) if SPLITS > 1 else head
    if SPLITS > 1:  # places of float32's rows are made again, or they would wait in registers
        tile += tl.minimum(end, 0)  # 0, which the compiler does not know
        keys, stored = tokens_at(tile * BLOCK_N, k_order, batch, seqlen_k, BLOCK_N)
    store_head(dv, batch, into, keys, stored, acc_v, PART_0, PART_1, HEAD_DIM)
    if MODULATION == "range" or MODULATION == "max":  # which take keys without an order
        pairs = places_ptr + index * NUM_PLACES * seqlen_q
        acc_k = _add_extremes(
            acc_k,
            q,
            batch,
            head,
            records + THROUGH_MAX * seqlen_q,  # the other one's column is the next, as in places
            pairs,
            pairs + LISTED * seqlen_q,
            sm_scale * LOG2_E * tl.exp2(lift),
            tile * BLOCK_N,
            seqlen_q,
            MODULATION,
            PRECISION,
            HEAD_DIM,
            PART_0,
            PART_1,
            BLOCK_N,
            SPLITS,
        )
    back = tl.exp2(-lift) * LN_2  # from gradients times the factor
    acc_k = scale_rows(acc_k, nothing + (-back if NEGATE else back), PART_1)
    if seqlens is not None:
        acc_k = _of_keys(acc_k, left, PART_1)
    store_head(dk, batch, into, keys, stored, acc_k, PART_0, PART_1, HEAD_DIM)
