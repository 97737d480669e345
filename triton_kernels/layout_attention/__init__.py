"""Layout attention's launchers, named and called as the native ops are."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from dense_attn.triton_kernels import autotune, configs
from dense_attn.triton_kernels.layout_attention import fwd_specialised
from dense_attn.triton_kernels.layout_attention.bwd_kv import layout_attention_bwd_kv_kernel
from dense_attn.triton_kernels.layout_attention.bwd_q import layout_attention_bwd_q_kernel
from dense_attn.triton_kernels.layout_attention.fwd import layout_attention_fwd_kernel
from dense_attn.triton_kernels.layout_attention.records import NUMBERS, PLACES, STATS
from dense_attn.triton_kernels.layout_attention.row_fwd import layout_attention_row_fwd_kernel
from dense_attn.triton_kernels.layout_attention.tiles import tile_lists_kernel, word_bounds_kernel

_GRAIN, _ONE = tl.constexpr(configs.GRAIN), tl.constexpr(1)


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
) -> TileLists:
    """Lists of a layout, which depend on nothing else: made once, they serve every head, layer and
    step.
    """
    _, q_bounds = _word_bounds(q_regions, q_order, block_m)
    k_words, k_bounds = _word_bounds(k_regions, k_order, block_n)
    batch, query_tiles = max(len(q_bounds), len(k_bounds)), q_bounds.shape[1]
    key_tiles = k_bounds.shape[1]
    tiles = q_bounds.new_empty((batch, query_tiles, 2, key_tiles))
    counts = q_bounds.new_empty((batch, query_tiles, 3))
    if batch * query_tiles * key_tiles == 0:
        return TileLists(tiles, counts.zero_(), k_words)
    sizes = (query_tiles, key_tiles, k_regions.shape[-1])
    options = {"BLOCK_N": block_n, "KEY_TILES": configs.next_power_of_2(key_tiles)}
    bounds = (_tokens(q_bounds), _tokens(k_bounds))
    tile_lists_kernel[(batch * query_tiles,)](*bounds, tiles, counts, *sizes, **options)
    return TileLists(tiles, counts, k_words)


def layout_attention_fwd(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor,  # [B, H, M]
    modulation: str,
    scale: float,
    q_order: Tensor | None = None,  # int32 [M] or [B|1, M]
    k_order: Tensor | None = None,  # int32 [N] or [B|1, N]
    lists: TileLists | None = None,  # of these words and orders and of `fwd_blocks(q, k)`
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, stats) of `reference.layout_attention`; stats: what the backward pass needs."""
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    out, lse, stats = fwd_results(q)
    if batch * num_heads * seqlen_q == 0:
        return out, lse, stats
    if seqlen_k == 0:
        return out.zero_(), lse.fill_(-torch.inf), stats.fill_(-torch.inf)
    config = config or fwd_config(q, k)
    results, numbers = (_rows(out), lse, stats), (num_heads, seqlen_q, seqlen_k, abs(scale))
    kind = configs.architecture(q.device), configs.precision(q)
    row = configs.row_at_once(*kind, seqlen_k)
    undivided = 0 if row else configs.undivided(*kind)
    constants = _constants(q.shape[3], modulation, scale < 0, kind[1], undivided)
    grid = (batch * num_heads * -(-seqlen_q // config.BLOCK_M),)
    inputs, strengths = (_rows(q), _rows(k), _rows(v), _tokens(q_regions)), _rows(strength)
    if row:
        tensors = (*inputs, _tokens(k_regions), strengths, *results)
        layout_attention_row_fwd_kernel[grid](*tensors, *numbers, **constants, **config.launch)
        return out, lse, stats
    if lists is None:
        lists = tile_lists(q_regions, k_regions, q_order, k_order, config.BLOCK_M, config.BLOCK_N)
    visits = (_tokens(q_order), _tokens(k_order), strengths, *map(_tokens, lists))
    if config.specialised:
        fwd_specialised.launch(inputs, visits, results, numbers, constants, config)
        return out, lse, stats
    parked = None
    if config.parks and modulation != "mask":
        columns = constants["PART_0"] + constants["PART_1"]
        parked = q.new_empty((*q.shape[:3], columns), dtype=torch.float32)
    tensors = (*inputs, *visits, *results, parked)
    layout_attention_fwd_kernel[grid](*tensors, *numbers, **constants, **config.launch)
    return out, lse, stats


def layout_attention_bwd(
    grad_out: Tensor,  # [B, H, M, D]
    grad_lse: Tensor | None,  # [B, H, M]
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor,  # [B, H, M]
    out: Tensor,  # [B, H, M, D]
    stats: Tensor,  # [B, H, M, STATS]
    modulation: str,
    scale: float,
    q_order: Tensor | None = None,  # int32 [M] or [B|1, M]
    k_order: Tensor | None = None,  # int32 [N] or [B|1, N]
    config: tuple[configs.Config, configs.Config] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dstrength) of `reference.layout_attention`, the same bits on every run."""
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    dq, dk, dv, dstrength = grads = bwd_results(q, k, v)
    if batch * num_heads * seqlen_q * seqlen_k == 0:
        return tuple(grad.zero_() for grad in grads)
    if modulation != "mask":
        q_order = k_order = None  # every pair counts, so no order of theirs saves any
    words, orders = (_tokens(q_regions), _tokens(k_regions)), (_tokens(q_order), _tokens(k_order))
    numbers = q.new_empty(batch, num_heads, seqlen_q, NUMBERS, dtype=torch.float32)
    places = q.new_empty(batch, num_heads, seqlen_q, PLACES, dtype=torch.int32)
    sizes = num_heads, seqlen_q, seqlen_k, abs(scale)
    inputs, grad_rows = (_rows(q), _rows(k), _rows(v), *words, *orders), _rows(grad_out)
    constants = _constants(q.shape[3], modulation, scale < 0, configs.precision(q))
    by_query, by_key = config or bwd_config(q, k)
    lists = (None, None)
    if modulation == "mask":
        tokens = (q_regions, k_regions, q_order, k_order)
        lists = _mask_lists(*tokens, by_query.BLOCK_M, by_query.BLOCK_N)
    saved = (_rows(strength), _rows(out), stats)
    results = (_rows(dq), dstrength, numbers, places)
    grads_of = (grad_rows, None if grad_lse is None else _rows(grad_lse))
    layout_attention_bwd_q_kernel[(batch * num_heads * -(-seqlen_q // by_query.BLOCK_M),)](
        *grads_of, *inputs, *saved, *lists, *results, *sizes, **constants, **by_query.launch
    )
    if modulation == "mask":
        tokens = (k_regions, q_regions, k_order, q_order)
        lists = _mask_lists(*tokens, by_key.BLOCK_N, by_key.BLOCK_M)
    results = (numbers, places, *lists, _rows(dk), _rows(dv))
    layout_attention_bwd_kv_kernel[(batch * num_heads * -(-seqlen_k // by_key.BLOCK_N),)](
        grad_rows, *inputs, *results, *sizes, **constants, **by_key.launch
    )
    return grads


def _mask_lists(
    rows: Tensor,
    columns: Tensor,
    row_order: Tensor | None,
    column_order: Tensor | None,
    block_rows: int,
    block_columns: int,
) -> tuple[tuple, tuple]:
    """Lists as the backward kernels take them for "mask", which visits matched tiles alone."""
    lists = tile_lists(rows, columns, row_order, column_order, block_rows, block_columns)
    return _tokens(lists.tiles), _tokens(lists.counts)


def bwd_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten (dq, dk, dv, dstrength)."""
    batch, num_heads, seqlen_q, _ = q.shape
    dstrength = q.new_empty(batch, num_heads, seqlen_q, dtype=torch.float32)
    return empty_rows_like(q), empty_rows_like(k), empty_rows_like(v), dstrength


def fwd_config(q: Tensor, k: Tensor) -> configs.Config:
    """The configuration of a forward call."""
    kind = configs.architecture(q.device), configs.precision(q)
    config = configs.layout_attention_fwd(*kind, q.shape[3], k.shape[2])
    if not autotune.requested():
        return config
    row = configs.row_at_once(*kind, k.shape[2])
    options = autotune.neighbours(config, same_keys=row)
    return autotune.best("row_fwd" if row else "fwd", q, k, options, lambda: _fwd_launch(q, k))


def bwd_config(q: Tensor, k: Tensor) -> tuple[configs.Config, configs.Config]:
    """The configurations of a backward call: of the passes over query tiles and over key tiles."""
    by_query, by_key = configs.layout_attention_bwd(
        configs.architecture(q.device), configs.precision(q), q.shape[3]
    )
    if not autotune.requested():
        return by_query, by_key

    def tuned(
        kernel: str, table: configs.Config, pair: Callable[[configs.Config], tuple]
    ) -> configs.Config:
        return autotune.best(
            kernel, q, k, autotune.neighbours(table), lambda: _bwd_launch(q, k, pair)
        )

    by_query = tuned("bwd_q", by_query, lambda config: (config, by_key))
    return by_query, tuned("bwd_kv", by_key, lambda config: (by_query, config))


def _example(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Random q, k, v like these, four regions in runs, and strengths, to measure a call by."""
    words = [
        1 << (torch.arange(x.shape[2], device=q.device, dtype=torch.int32) * 4 // x.shape[2])
        for x in (q, k)
    ]
    # Of its own: the caller's random numbers stay what they are.
    generator = torch.Generator(q.device).manual_seed(0)
    rows = (torch.empty_like(x).normal_(generator=generator) for x in (q, k, k))
    return *rows, *words, torch.full(q.shape[:3], 0.3, dtype=torch.float32, device=q.device)


def _fwd_launch(q: Tensor, k: Tensor) -> autotune.Launch:
    inputs, scale = _example(q, k), q.shape[3] ** -0.5

    def launch(config: configs.Config) -> Callable[[], object]:
        lists = tile_lists(*inputs[3:5], None, None, config.BLOCK_M, config.BLOCK_N)
        return lambda: layout_attention_fwd(*inputs, "range", scale, lists=lists, config=config)

    return launch


def _bwd_launch(q: Tensor, k: Tensor, pair: Callable[[configs.Config], tuple]) -> autotune.Launch:
    inputs, scale = _example(q, k), q.shape[3] ** -0.5
    out, _, stats = layout_attention_fwd(*inputs, "range", scale)
    arguments = (out, None, *inputs, out, stats, "range", scale)
    return lambda config: lambda: layout_attention_bwd(*arguments, config=pair(config))


def fwd_tiles(q: Tensor, k: Tensor) -> configs.Config | None:
    """The configuration of a forward call in tiles; None where a row of scores is one tile."""
    kind = configs.architecture(q.device), configs.precision(q)
    if k.shape[2] == 0 or configs.row_at_once(*kind, k.shape[2]):
        return None
    return fwd_config(q, k)


def fwd_blocks(q: Tensor, k: Tensor) -> tuple[int, int] | None:
    """Rows and keys of a forward call's tiles, which lists made beforehand must share; None where
    it has no tiles.
    """
    config = fwd_tiles(q, k)
    return None if config is None else (config.BLOCK_M, config.BLOCK_N)


def fwd_results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten (out, lse, stats)."""
    batch, num_heads, seqlen_q, _ = q.shape
    lse = q.new_empty(batch, num_heads, seqlen_q, dtype=torch.float32)
    stats = q.new_empty(batch, num_heads, seqlen_q, STATS, dtype=torch.float32)
    return empty_rows_like(q), lse, stats


def empty_rows_like(q: Tensor) -> Tensor:
    """In q's memory order, unless that leaves the last axis apart; other devices have the same
    rule.
    """
    like = torch.empty_like(q)
    if like.is_contiguous():
        return like
    return like if q.shape[3] == 1 or like.stride(3) == 1 else q.new_empty(q.shape)


def _word_bounds(words: Tensor, order: Tensor | None, block: int) -> tuple[Tensor, Tensor]:
    """Int32: words as visited [B|1, tokens], each tile's or and and [B|1, tiles, 2]."""
    samples = max([x.shape[0] for x in (words, order) if x is not None and x.dim() == 2], default=1)
    tiles = -(-words.shape[-1] // block)
    visited = words.new_empty((samples, words.shape[-1]))
    bounds = words.new_empty((samples, tiles, 2))
    word_bounds_kernel[(samples * tiles,)](
        _tokens(words), _tokens(order), visited, bounds, words.shape[-1], BLOCK=block
    )
    return visited, bounds


@lru_cache(maxsize=256)
def _constants(
    head_dim: int, modulation: str, negate: bool, precision: str, undivided: int = 0
) -> dict[str, object]:
    """The constants that the kernels are compiled for beside the tile."""
    first, second = configs.head_parts(head_dim, undivided)
    return {
        "MODULATION": modulation,
        "NEGATE": negate,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "HEAD_DIM": head_dim,
        "PART_0": first,
        "PART_1": second,
    }


def _rows(x: Tensor) -> tuple[Tensor, int, int, int, tl.constexpr]:
    """[B, H, tokens, ...] as kernels take it: the tensor and its strides in grains, the last axis's
    left out.
    """
    return x, *_grains(x.shape, x.stride())


@lru_cache(maxsize=1024)
def _grains(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, int, tl.constexpr]:
    """The strides of [B, H, tokens, ...] as kernels take them; rows begin within 2**32 grains."""
    batch, num_heads, tokens = shape[:3]
    a, b, c = strides[:3]
    a, b, c = a if batch > 1 else 0, b if num_heads > 1 else 0, c if tokens > 1 else 0
    if (a | b | c) % configs.GRAIN == 0 and (tokens - 1) * c < configs.GRAIN << 32:
        return a // configs.GRAIN, b // configs.GRAIN, c // configs.GRAIN, _GRAIN
    return a, b, c, _ONE


def _tokens(x: Tensor | None) -> tuple[Tensor, int, int] | None:
    """[tokens] or [B|1, tokens, ...] as kernels take it: the tensor and two strides, 0 where
    samples share one row.
    """
    if x is None:
        return None
    if x.dim() == 1:
        return x, 0, x.stride(0)
    return x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)
