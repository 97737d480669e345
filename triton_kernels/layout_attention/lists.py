"""Which tiles of keys each tile of queries meets, as lists that kernels walk."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dense_attn.triton_kernels.layout_attention.arguments import counted, tokens_of
from dense_attn.triton_kernels.layout_attention.tiles import tile_lists_kernel, word_bounds_kernel
from dense_attn.triton_kernels.parts import next_power_of_2


class TileLists(NamedTuple):
    """The key tiles of each tile of query rows by kind, for one size of tile."""

    # int32 [B|1, query tiles, 2, key tiles]: matched from the left and unmatched from the right; in
    # doubt.
    tiles: Tensor
    counts: Tensor  # int32 [B|1, query tiles, 3]: matched, in doubt, unmatched
    k_words: Tensor  # int32 [B|1, keys]: their words as they are visited


def tile_lists(
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    q_order: Tensor | None,  # int32 [M] or [B|1, M]
    k_order: Tensor | None,  # int32 [N] or [B|1, N]
    block_m: int,
    block_n: int,
    seqlens_k: Tensor | None = None,  # int32 [B]
    seqlens_q: Tensor | None = None,  # int32 [B], where the rows are keys
) -> TileLists:
    """Lists of a layout, which depend on nothing else: made once, they serve every head, layer and
    step.
    """
    _, q_bounds = _word_bounds(q_regions, q_order, block_m, seqlens_q)
    k_words, k_bounds = _word_bounds(k_regions, k_order, block_n, seqlens_k)
    samples = len(q_bounds), len(k_bounds)
    batch, query_tiles = max(samples) if min(samples) else 0, q_bounds.shape[1]
    key_tiles = k_bounds.shape[1]
    tiles = q_bounds.new_empty((batch, query_tiles, 2, key_tiles))
    counts = q_bounds.new_empty((batch, query_tiles, 3))
    if batch * query_tiles * key_tiles == 0:
        return TileLists(tiles, counts.zero_(), k_words)
    sizes = (query_tiles, key_tiles, k_regions.shape[-1])
    options = {"BLOCK_N": block_n, "KEY_TILES": next_power_of_2(key_tiles), **counted(seqlens_k)}
    bounds = (tokens_of(q_bounds), tokens_of(k_bounds))
    tile_lists_kernel[(batch * query_tiles,)](*bounds, tiles, counts, *sizes, **options)
    return TileLists(tiles, counts, k_words)


def _word_bounds(
    words: Tensor, order: Tensor | None, block: int, seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Int32: words as visited [B|1, tokens], and the or and the and of each tile's [B|1, tiles,
    2].
    """
    samples = max([x.shape[0] for x in (words, order) if x is not None and x.dim() == 2], default=1)
    samples = samples if seqlens is None else max(samples, seqlens.shape[0])
    tiles = -(-words.shape[-1] // block)
    visited, bounds = (
        words.new_empty((samples, words.shape[-1])),
        words.new_empty((samples, tiles, 2)),
    )
    word_bounds_kernel[(samples * tiles,)](
        tokens_of(words),
        tokens_of(order),
        visited,
        bounds,
        words.shape[-1],
        BLOCK=block,
        **counted(seqlens),
    )
    return visited, bounds
