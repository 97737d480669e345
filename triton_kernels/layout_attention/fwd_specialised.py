"""Layout attention forward with specialised warps: one group fetches tiles of keys through tensor
maps while two groups of 64 query rows weigh them.

Keys and values are packed in the order of visits first, so that a tile of theirs is one box. The
compiler gives every group a copy of the kernel, and asks for some care:

- A tile of keys is a box of a tensor map, and what is loaded otherwise must not reach a product
  unless a loop that holds the products carries it and changes it: hence the loop over populations,
  which turns q's rows by the sign of their temperatures, and turns the words twice.
- What a loop starts from must not be a product or a carried value itself: hence the sums with 0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dense_attn.triton_kernels.layout_attention.arguments import FwdPlan
from dense_attn.triton_kernels.layout_attention.fwd_mixed import attend_mixed, softmax_weights
from dense_attn.triton_kernels.layout_attention.fwd_steps import LEAST_FACTOR, of_samples, shares_of
from dense_attn.triton_kernels.layout_attention.records import store_stats
from dense_attn.triton_kernels.layout_attention.tiles import keys_of
from dense_attn.triton_kernels.primitives import (
    LOG2_E,
    head_of,
    load_numbers,
    load_part,
    part_of,
    row_stride,
    store_part,
    temperature,
    tile_in_turn,
    tile_of_program,
    tokens_at,
    tokens_of,
    words_at,
)

# Extremes of floats from their bits. Read as integers, signed and not, floats ascend above 0 and
# descend below: the largest float is the larger of the largest and the smallest signed integer, the
# smallest the smaller of the largest unsigned and the smallest signed one. Nothing changes these.
MINUS_INFINITY, INFINITY = tl.constexpr(-0x800000), tl.constexpr(0x7F800000)
NO_NUMBER = tl.constexpr(0x7FFFFFFF)
# Keys of a tile up to which sums stay apart by column until the loop is left: no round asks other
# threads for them. Of more keys they would not stay in registers.
APART_KEYS = tl.constexpr(64)


@triton.jit
def packed_rows_kernel(
    k,
    v,
    order,
    keys_ptr,  # [B*H, padded, D]
    values_ptr,
    visited,
    words_ptr,  # int32 [B, padded]; or None where the keys end with a tile
    # of queries: which tiles [B*H, query tiles] have no strength
    q_order,
    strength,
    plain_ptr,
    num_heads,
    seqlen_q,
    seqlen,
    padded,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr = 1,
    seqlens=None,
):
    """Rows of keys (programs 0 of the second axis) or values in the order of visits; behind the
    end copies of the last key with its word, which change no extreme, and values of zeros; beside
    keys which tiles of queries have no strength in any row.
    """
    index, tile, batch, head = tile_of_program(num_heads, padded, BLOCK)
    if plain_ptr is not None and tl.program_id(1) == 0:
        query_tiles = tl.cdiv(seqlen_q, BLOCK_M)
        for of in range(tile, GROUP * query_tiles, tl.cdiv(padded, BLOCK)):
            own = head * GROUP + of // query_tiles
            queries, there = tokens_at(
                of % query_tiles * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M
            )
            some = load_numbers(strength, batch, own, queries, there) != 0
            plain = 1 - tl.max(some.to(tl.int32), 0)
            tl.store(plain_ptr + index * GROUP * query_tiles + of, plain)
    places = tile * BLOCK + tl.arange(0, BLOCK)
    keys_there = keys_of(seqlens, batch, seqlen)
    exist = places < keys_there
    within = tl.minimum(places, tl.maximum(keys_there - 1, 0))
    if words_ptr is not None and (head == 0) & (tl.program_id(1) == 0):
        words = tl.load(visited[0] + batch * visited[1] + within)
        tl.store(words_ptr + batch * padded + places, words)
    tokens, _ = tokens_of(within, order, batch, seqlen)
    base, stride, to = head_of(k, batch, head), row_stride(k), keys_ptr
    if tl.program_id(1) == 1:
        base, stride, to = head_of(v, batch, head), row_stride(v), values_ptr
    else:
        exist = places < padded
    rows = load_part(base, stride, tokens, exist, 0, PART, HEAD_DIM)
    to += index * padded * HEAD_DIM
    at, there = part_of(to, HEAD_DIM, places, places < padded, 0, PART, HEAD_DIM)
    tl.store(at, rows, mask=there)


@triton.jit
def _attend(rows, factor, source, tiles, count, plain, STAGES: tl.constexpr):
    """State and smallest score of one population over `count` listed tiles that are all of it, or
    over the first where all are plain.
    """
    keys, values, first_row = source
    BLOCK_M: tl.constexpr = rows.shape[0]
    BLOCK_N: tl.constexpr = keys.block_shape[0]
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum, acc = tl.zeros([BLOCK_M], tl.float32), tl.zeros(rows.shape, tl.float32)
    if BLOCK_N <= APART_KEYS:
        row_sum = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    most = tl.full([BLOCK_M], MINUS_INFINITY, tl.int32)
    least = tl.full([BLOCK_M], NO_NUMBER, tl.int32)
    most_unsigned = tl.full([BLOCK_M], INFINITY, tl.uint32)
    # Of more keys what does not change stays in the loop: before it, it would spill.
    MANY: tl.constexpr = BLOCK_N > APART_KEYS
    for place in tl.range(0, count, warp_specialize=True, num_stages=STAGES, disable_licm=MANY):
        row = first_row + tl.where(plain, place, tl.load(tiles + place)) * keys.block_shape[0]
        raw = tl.dot(rows, keys.load([row, 0]).T)
        # One instruction compares three integers, but two floats.
        most = tl.maximum(most, tl.max(raw.to(tl.int32, bitcast=True), 1))
        least = tl.minimum(least, tl.min(raw.to(tl.int32, bitcast=True), 1))
        most_unsigned = tl.maximum(most_unsigned, tl.max(raw.to(tl.uint32, bitcast=True), 1))
        before = row_max
        row_max = tl.maximum(most.to(tl.float32, bitcast=True), least.to(tl.float32, bitcast=True))
        weights, alpha = softmax_weights(before, row_max, raw, factor)
        own = values.load([row, 0])
        acc = tl.dot(weights.to(own.dtype), own, acc * alpha[:, None])
        if BLOCK_N <= APART_KEYS:
            row_sum = row_sum * alpha[:, None] + weights
        else:
            row_sum = row_sum * alpha + tl.sum(weights, 1)
    if BLOCK_N <= APART_KEYS:
        row_sum = tl.sum(row_sum, 1)
    low = most_unsigned.to(tl.float32, bitcast=True)
    return (row_max, row_sum, acc), tl.minimum(low, least.to(tl.float32, bitcast=True))


@triton.jit
def _without_strength(strength, plain_ptr, batch, head, place):
    """Whether no row of a tile has a strength, as was found where keys were packed, since a
    reduction over rows would cross the groups of warps; else whether all of a head have one, 0.
    """
    if strength[0] is None:
        plain = tl.cast(strength[1], tl.float32) == 0
    elif plain_ptr is not None:
        plain = tl.load(plain_ptr + place) != 0
    else:
        plain = tl.where(strength[3] == 0, tl.load(head_of(strength, batch, head)) == 0, False)
    return plain


@triton.jit
def _tokens_again(first, order, batch, num_tokens, BLOCK: tl.constexpr):
    """The tokens of `tokens_at`, read once more, so that no loop carries them."""
    places = first + tl.arange(0, BLOCK)
    tokens = places
    if order is not None:
        at = order[0] + batch * order[1] + places * order[2]
        tokens = tl.load(at, mask=places < num_tokens, other=0, volatile=True)
        tokens = tl.minimum(tl.maximum(tokens, 0), num_tokens - 1)
    return tokens.to(tl.int64)


@triton.jit
def layout_attention_specialised_fwd_kernel(
    q,
    keys,
    values,  # tensor maps of packed rows [B*H*padded_k, D]
    q_words,
    q_order,
    strength,  # (pointer, strides)
    plain_ptr,  # uint8 [B*H, query tiles]: where no row has a strength; or None
    # [B|1, query tiles, 2, key tiles], [B|1, query tiles, 3], [B|1, keys]: `TileLists`
    tiles,
    counts,
    visited,  # up to a whole tile
    out,
    lse_ptr,
    stats_ptr,
    num_heads,
    seqlen_q,
    seqlen_k,
    padded_k,
    sm_scale,
    MODULATION: tl.constexpr,
    NEGATE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
    ENDS: tl.constexpr,
    COMPILED: tl.constexpr,
    GROUP: tl.constexpr = 1,
    seqlens=None,
):
    """One tile of query rows: matched tiles of keys, the others, those in doubt, and the merge.
    Where no row has a strength all keys are matched.
    """
    WIDTH: tl.constexpr = HEAD_DIM * q[0].dtype.element_ty.primitive_bitwidth // 8
    index, tile, batch, head = tile_in_turn(num_heads, seqlen_q, seqlen_k, WIDTH, BLOCK_M)
    tokens, exist = tokens_at(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    rows = -load_part(head_of(q, batch, head), row_stride(q), tokens, exist, 0, PART, HEAD_DIM)
    row_words = ~words_at(q_words, batch, tokens, exist)
    c = load_numbers(strength, batch, head, tokens, exist)
    tau = temperature(c, MODULATION)
    factor = tl.maximum(tl.abs(tau) * sm_scale * LOG2_E, LEAST_FACTOR)
    factor = tl.where((tau < 0) != NEGATE, factor, -factor)
    key_tiles = tl.cdiv(seqlen_k, BLOCK_N)
    listed = tiles[0] + batch * tiles[1] + tile * tl.cast(2 * key_tiles, tl.int64)
    count_at = counts[0] + batch * counts[1] + tile * 3
    own = index
    if GROUP > 1:
        own = index // GROUP
    source = (keys, values, (own * padded_k).to(tl.int32))
    keys_there = keys_of(seqlens, batch, seqlen_k)
    whole, plain = keys_there // BLOCK_N, False
    if MODULATION != "mask":
        place = index * tl.cdiv(seqlen_q, BLOCK_M) + tile
        plain = _without_strength(strength, plain_ptr, batch, head, place)

    ends = tl.cdiv(keys_there, BLOCK_N) - whole
    least, none = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    in_max, in_sum, in_acc = least, none, tl.zeros([BLOCK_M, PART], tl.float32)
    out_max, out_sum, out_acc = least, none, in_acc
    low = -least
    in_doubt = tl.load(count_at + 1)
    # The tile that the keys end in is the last; lists of other counts lead to no other memory.
    passed = tl.where(plain & (in_doubt >= ends), in_doubt - ends, 0)
    for population in tl.range(0, 2):
        # A product, exact, since a choice of half floats takes a pair of registers apart.
        rows = rows * tl.where(factor < 0, -1.0, 1.0).to(rows.dtype)[:, None]
        factor, row_words = tl.abs(factor), row_words ^ -population
        in_max, in_sum, in_acc = out_max + 0.0, out_sum + 0.0, out_acc + 0.0
        count = tl.load(count_at + 2 * population)
        at = listed + population * (key_tiles - count)
        if MODULATION == "mask":
            count *= 1 - population
        else:
            count = tl.where(plain, (1 - population) * whole, count)
        state, lower = _attend(rows, factor, source, at, count, plain, STAGES)
        out_max, out_sum, out_acc = state
        matched, others, lowest = attend_mixed(
            (in_max, in_sum, in_acc),
            (out_max, out_sum, out_acc + 0.0),
            rows,
            row_words,
            factor,
            source,
            visited[0] + batch * visited[1],
            listed + key_tiles + passed,
            population * (in_doubt - passed),
            keys_there,
            ENDS,
            COMPILED,
        )
        in_max, in_sum, in_acc = matched
        out_max, out_sum, out_acc = others
        low = tl.minimum(low, tl.minimum(lower, lowest))
    tokens = _tokens_again(tile * BLOCK_M, q_order, batch, seqlen_q, BLOCK_M)
    c = load_numbers(strength, batch, head, tokens, exist)
    if MODULATION == "mask":  # what others hold, be it NaN, is not looked at
        out_max, out_sum = least, none
    tops = of_samples((in_max, in_sum, out_max, out_sum, low), seqlens, keys_there)
    share_in, share_out, lse, stats = shares_of(tops, c, sm_scale, plain, MODULATION)
    store_stats(lse, stats, lse_ptr, stats_ptr, index * seqlen_q + tokens, exist, APART=True)
    if stats_ptr is None and MODULATION != "range":
        # Never stored: the compiler gives up on a loop that carries what nothing takes.
        nowhere = tl.arange(0, BLOCK_M)
        tl.store(out[0] + nowhere, low.to(out[0].dtype.element_ty), mask=nowhere < -num_heads)
    merged = in_acc * share_in[:, None]
    if MODULATION != "mask":
        merged += out_acc * share_out[:, None]
    store_part(head_of(out, batch, head), row_stride(out), tokens, exist, merged, 0, PART, HEAD_DIM)


def launch(
    inputs: tuple,  # q, k and v as kernels take them, and the words of q's tokens
    visits: tuple,  # both orders, strengths, and lists of the configuration's tiles
    results: tuple,
    sm_scale: float,
    plan: FwdPlan,
    counts: dict[str, tuple[Tensor, int]],  # how many keys of a sample are there, or nothing
) -> None:
    """Pack the keys and values, unless they lie as maps take them, and attend to them."""
    rows, keys, values, words_of = inputs
    q_order, k_order, strength, *lists = visits
    (*lists, visited), own = lists, plan.specialised
    sources, plain = (keys[0], values[0]), None
    if not own.in_place or sources[0].data_ptr() % 16 or sources[1].data_ptr() % 16:
        sources = [x.new_empty_strided(*own.packed) for x in sources]
        room = sources[0].new_empty_strided
        words = None if own.words is None else room(*own.words, dtype=torch.int32)
        plain = None if own.plain is None else room(*own.plain, dtype=torch.uint8)
        tensors = keys, values, k_order, *sources, visited, words, q_order, strength, plain
        packed_rows_kernel[own.pack_grid](*tensors, *own.pack_sizes, **own.pack_options, **counts)
        visited = visited if words is None else (words, *own.words[1])
    maps = [_map_of(x, own.map) for x in sources]
    tensors = (rows, *maps, words_of, q_order, strength, plain, *lists, visited, *results)
    layout_attention_specialised_fwd_kernel[plan.grid](
        *tensors, *plan.sizes, own.pack_sizes[-1], sm_scale, **own.options, **counts
    )


def _map_of(x: Tensor, like: TensorDescriptor) -> TensorDescriptor:
    """A tensor map like one that was checked when it was made, which takes longer than the rest."""
    found = object.__new__(TensorDescriptor)
    vars(found).update(vars(like), base=x)
    return found
