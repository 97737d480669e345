"""Which tiles of keys a tile of query rows meets: all pairs matched, some, or none."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.primitives import add_product, head_of, part_of, tokens_at, words_at


@triton.jit
def keys_of(seqlens, batch, seqlen):
    """How many of a sample's keys are there, the first ones; all without counts."""
    if seqlens is not None:
        count = tl.load(seqlens[0] + batch * seqlens[1])
        seqlen = tl.minimum(tl.maximum(count, 0), tl.cast(seqlen, tl.int32))
    return seqlen


@triton.jit
def key_head_of(head, GROUP: tl.constexpr):
    """The head of keys that a head of queries meets, as GROUP of them do."""
    if GROUP > 1:
        head = head // GROUP
    return head


@triton.jit
def word_bounds_kernel(
    words, order, visited_ptr, bounds_ptr, seqlen, BLOCK: tl.constexpr, seqlens=None
):
    """One tile of tokens: its words as visited [B|1, tokens], and the bounds of those that are
    there [B|1, tiles, 2].
    """
    tiles = tl.cdiv(seqlen, BLOCK)
    index = tl.program_id(0).to(tl.int64)
    batch, tile = index // tiles, (index % tiles).to(tl.int32)
    tokens, exist = tokens_at(tile * BLOCK, order, batch, seqlen, BLOCK)
    bits = tl.arange(0, 32)
    visited = words_at(words, batch, tokens, exist)
    place = tile * BLOCK + tl.arange(0, BLOCK)
    tl.store(visited_ptr + batch * seqlen + place, visited, mask=exist)
    if seqlens is not None:
        exist = place < keys_of(seqlens, batch, seqlen)
        visited = tl.where(exist, visited, 0)
    held = (visited[:, None] >> bits[None, :]) & 1  # [tokens, 32]
    some = tl.max(held, 0)
    every = tl.min(tl.where(exist[:, None], held, 1), 0)
    tl.store(bounds_ptr + 2 * index, tl.sum(some << bits, 0))
    tl.store(bounds_ptr + 2 * index + 1, tl.sum(every << bits, 0))


@triton.jit
def tile_lists_kernel(
    q_bounds,
    k_bounds,
    tiles_ptr,
    counts_ptr,
    query_tiles,
    key_tiles,
    seqlen_k,
    BLOCK_N: tl.constexpr,
    KEY_TILES: tl.constexpr,
    seqlens=None,
):
    """One tile of query rows: its wholly matched key tiles, those in doubt, and its wholly
    unmatched ones.
    """
    index = tl.program_id(0).to(tl.int64)
    batch = index // query_tiles
    at = q_bounds[0] + batch * q_bounds[1] + (index % query_tiles) * 2
    q_some, q_every = tl.load(at), tl.load(at + 1)
    key_tile = tl.arange(0, KEY_TILES)
    exist = key_tile < key_tiles
    if seqlens is not None:
        seqlen_k = keys_of(seqlens, batch, seqlen_k)
        exist = key_tile < tl.cdiv(seqlen_k, BLOCK_N)
    at = k_bounds[0] + batch * k_bounds[1] + key_tile * 2
    k_some, k_every = tl.load(at, mask=exist, other=0), tl.load(at + 1, mask=exist, other=0)
    # The tile that the keys end in is tested key by key.
    whole = exist & ((key_tile + 1) * BLOCK_N <= seqlen_k)
    matched = whole & ((q_every & k_every) != 0)
    others = whole & ((q_some & k_some) == 0)
    mixed = exist & ~matched & ~others
    place_in = tl.cumsum(matched.to(tl.int32), 0) - 1
    place_mixed = tl.cumsum(mixed.to(tl.int32), 0) - 1
    place_out = tl.cumsum(others.to(tl.int32), 0)
    listed = tiles_ptr + index * (2 * key_tiles)
    tl.store(listed + place_in, key_tile, mask=matched)
    tl.store(listed + key_tiles - place_out, key_tile, mask=others)
    tl.store(listed + key_tiles + place_mixed, key_tile, mask=mixed)
    tl.store(counts_ptr + index * 3, tl.sum(matched.to(tl.int32), 0))
    tl.store(counts_ptr + index * 3 + 1, tl.sum(mixed.to(tl.int32), 0))
    tl.store(counts_ptr + index * 3 + 2, tl.sum(others.to(tl.int32), 0))


@triton.jit
def tile_at(listed, tiles_listed, place, num_whole, tiles):
    """Tile at a place of a list, matched ones first; without a list, the place."""
    tile = place
    if tiles is not None:
        tile = tl.load(listed + place + tl.where(place < num_whole, 0, tiles_listed - num_whole))
    return tile


@triton.jit
def listed_tiles(tiles, counts, batch, tile, num_tiles):
    """(list, its wholly matched tiles, all tiles to visit) of one tile; every tile where there is
    no list.
    """
    listed, num_whole, count = tile, 0, num_tiles
    if tiles is not None:
        # A size of 1 is no tensor, hence the cast.
        listed = tiles[0] + batch * tiles[1] + tile * tl.cast(2 * num_tiles, tl.int64)
        at = counts[0] + batch * counts[1] + tile * 3
        num_whole = tl.load(at)
        count = num_whole + tl.load(at + 1)
    return listed, num_whole, count


@triton.jit
def grains_of(x, tokens):
    """Where rows of a head of x [B, H, tokens, ...] begin, in grains: by a product of 32 bits where
    the launcher sees to it that they begin within 2**32 of them.
    """
    if x[4] == 1:
        grains = tl.cast(tokens, tl.int64) * x[3]
    else:
        grains = (tl.cast(tokens, tl.uint32) * tl.cast(x[3], tl.uint32)).to(tl.int64)
    return grains


@triton.jit
def rows_at(x, batch, head, tokens):
    """Rows of one head of x [B, H, tokens, ...] as `load_rows` takes them."""
    return head_of(x, batch, head), x[4], grains_of(x, tokens)


@triton.jit
def add_tokens(
    acc,
    weights,
    source,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PRECISION: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """acc + weights [I, tokens] @ rows of a head, in parts, of `source`: rows, where they are, and
    which exist. Other products are over their columns, and the compiler copies ahead only what all
    products read in one order: numbers of 4 bytes that need both come by AHEAD, loaded once more
    or turned on their way through registers.
    """
    rows, at, exist = source
    weights = weights.to(rows[0].dtype)
    first, second = rows
    if AHEAD == "loaded":
        # Another policy of eviction keeps the second load from being made the first one.
        places, there = part_of(*at, exist, 0, PART_0, HEAD_DIM)
        first = tl.load(places, mask=there, other=0.0, eviction_policy="evict_last")
        if PART_1 > 0:
            places, there = part_of(*at, exist, PART_0, PART_1, HEAD_DIM)
            second = tl.load(places, mask=there, other=0.0, eviction_policy="evict_last")
    elif AHEAD == "turned":
        weights, first = _in_steps(weights), tl.trans(_in_steps(tl.trans(first)))
        if PART_1 > 0:
            second = tl.trans(_in_steps(tl.trans(second)))
    return add_product(acc, weights, (first, second), PART_1, PRECISION)


@triton.jit
def _in_steps(x):
    """x [I, tokens] in another order of tokens: of each eight the even ones first. A lane of
    NVIDIA's matrix units has neighbours of scores, and gives a product of tf32 those that are four
    apart, so no lane asks another for its weights.
    """
    eights = tl.reshape(x, [x.shape[0], x.shape[1] // 8, 4, 2])
    return tl.reshape(tl.permute(eights, (0, 1, 3, 2)), x.shape)
