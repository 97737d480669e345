"""Layout attention's launchers, named and called as the native ops are."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from dense_attn.triton_kernels import autotune, configs
from dense_attn.triton_kernels.layout_attention import fwd_specialised
from dense_attn.triton_kernels.layout_attention.arguments import (
    counted,
    numbers_of,
    rows_of,
    tokens_of,
)
from dense_attn.triton_kernels.layout_attention.bwd_kv import layout_attention_bwd_kv_kernel
from dense_attn.triton_kernels.layout_attention.bwd_q import layout_attention_bwd_q_kernel
from dense_attn.triton_kernels.layout_attention.fwd import layout_attention_fwd_kernel
from dense_attn.triton_kernels.layout_attention.lists import TileLists, tile_lists
from dense_attn.triton_kernels.layout_attention.records import NUMBERS, PLACES, STATS
from dense_attn.triton_kernels.layout_attention.row_fwd import layout_attention_row_fwd_kernel
from dense_attn.triton_kernels.parts import head_parts


def layout_attention_fwd(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H / G, N, D]
    v: Tensor,  # [B, H / G, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor | None,  # [B, H, M]
    modulation: str,
    scale: float,
    q_order: Tensor | None = None,  # int32 [M] or [B|1, M]
    k_order: Tensor | None = None,  # int32 [N] or [B|1, N]
    lists: TileLists | None = None,  # of these words and orders and of `fwd_blocks`
    every_strength: float = 1.0,  # of all rows, where strength is None
    with_lse: bool = True,
    with_stats: bool = True,
    seqlens_k: Tensor | None = None,  # int32 [B]
    config: configs.Config | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, stats) of `reference.layout_attention`; stats is what the backward pass needs of
    each row. What is not asked for is empty.
    """
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    out, lse, stats = fwd_results(q, with_lse, with_stats)
    if batch * num_heads * seqlen_q == 0:
        return out, lse, stats
    if seqlen_k == 0:
        return out.zero_(), lse.fill_(-torch.inf), stats.fill_(-torch.inf)
    if config is None:
        config = fwd_config(q, k, q_order is not None or k_order is not None)
    results = rows_of(out), lse if with_lse else None, stats if with_stats else None
    numbers = num_heads, seqlen_q, seqlen_k, abs(scale)
    kind = configs.architecture(q.device), configs.precision(q)
    row = lists is None and configs.row_at_once(*kind, seqlen_k)
    kernel = "row_fwd" if row else "fwd"
    constants = _constants(kernel, *kind, q.shape[3], modulation, scale < 0, _group(q, k))
    there = counted(seqlens_k)
    grid = (batch * num_heads * -(-seqlen_q // config.BLOCK_M),)
    inputs = rows_of(q), rows_of(k), rows_of(v), tokens_of(q_regions)
    strengths = numbers_of(strength, every_strength)
    if row:
        tensors = (*inputs, tokens_of(k_regions), strengths, *results)
        options = {**constants, **config.launch, **there}
        layout_attention_row_fwd_kernel[grid](*tensors, *numbers, **options)
        return out, lse, stats
    if lists is None:
        tokens, blocks = (q_regions, k_regions, q_order, k_order), (config.BLOCK_M, config.BLOCK_N)
        lists = tile_lists(*tokens, *blocks, seqlens_k)
    visits = (tokens_of(q_order), tokens_of(k_order), strengths, *map(tokens_of, lists))
    if config.specialised:
        fwd_specialised.launch(inputs, visits, results, numbers, constants, there, config)
        return out, lse, stats
    parked = None
    if config.parks and modulation != "mask":
        columns = constants["PART_0"] + constants["PART_1"]
        parked = q.new_empty((*q.shape[:3], columns), dtype=torch.float32)
    tensors = (*inputs, *visits, *results, parked)
    layout_attention_fwd_kernel[grid](*tensors, *numbers, **constants, **config.launch, **there)
    return out, lse, stats


def layout_attention_bwd(
    grad_out: Tensor,  # [B, H, M, D]
    grad_lse: Tensor | None,  # [B, H, M]
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H / G, N, D]
    v: Tensor,  # [B, H / G, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor | None,  # [B, H, M]
    out: Tensor,  # [B, H, M, D]
    stats: Tensor,  # [B, H, M, STATS]
    modulation: str,
    scale: float,
    q_order: Tensor | None = None,  # int32 [M] or [B|1, M]
    k_order: Tensor | None = None,  # int32 [N] or [B|1, N]
    every_strength: float = 1.0,  # of all rows, where strength is None
    seqlens_k: Tensor | None = None,  # int32 [B]
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
    visits = tokens_of(k_regions), tokens_of(q_order), tokens_of(k_order)
    numbers = q.new_empty(batch, num_heads, NUMBERS, seqlen_q, dtype=torch.float32)
    places = q.new_empty(batch, num_heads, PLACES, seqlen_q, dtype=torch.int32)
    sizes = num_heads, seqlen_q, seqlen_k, abs(scale)
    rows, grad_rows = (rows_of(q), rows_of(k), rows_of(v)), rows_of(grad_out)
    kind = configs.architecture(q.device), configs.precision(q)
    by_queries, by_keys = (
        _constants(kernel, *kind, q.shape[3], modulation, scale < 0, _group(q, k))
        | counted(seqlens_k)
        for kernel in ("bwd_q", "bwd_kv")
    )
    by_query, by_key = config or bwd_config(q, k)
    lists = (None, None)
    if modulation == "mask":
        tokens = (q_regions, k_regions, q_order, k_order)
        lists = _mask_lists(*tokens, by_query.BLOCK_M, by_query.BLOCK_N, None, seqlens_k)
    inputs = (*rows, tokens_of(q_regions), *visits)
    saved = (numbers_of(strength, every_strength), rows_of(out), stats)
    results = (rows_of(dq), dstrength, numbers, places)
    grads_of = (grad_rows, None if grad_lse is None else rows_of(grad_lse))
    layout_attention_bwd_q_kernel[(batch * num_heads * -(-seqlen_q // by_query.BLOCK_M),)](
        *grads_of, *inputs, *saved, *lists, *results, *sizes, **by_queries, **by_query.launch
    )
    if modulation == "mask":
        tokens = (k_regions, q_regions, k_order, q_order)
        lists = _mask_lists(*tokens, by_key.BLOCK_N, by_key.BLOCK_M, seqlens_k, None)
    # Conditions of every other row, by the count: sm_80 has masks of bits all the same.
    apart = kind[0] == "sm_90"
    keys_grads = _apart(q, k) if _group(q, k) > 1 else (dk, dv)
    results = (numbers, places, *lists, *map(rows_of, keys_grads))
    layout_attention_bwd_kv_kernel[(batch * num_heads * -(-seqlen_k // by_key.BLOCK_N),)](
        grad_rows, *rows, *visits, *results, *sizes, APART=apart, **by_keys, **by_key.launch
    )
    if _group(q, k) > 1:
        for grad, parts in zip((dk, dv), keys_grads):
            grad.copy_(parts.unflatten(1, (k.shape[1], _group(q, k))).sum(2))
    return grads


def _group(q: Tensor, k: Tensor) -> int:
    """Heads of q that meet one head of k."""
    return q.shape[1] // max(k.shape[1], 1)


def _apart(q: Tensor, k: Tensor) -> Tensor:
    """Room for dk and dv of each head of q, to be summed in the order of the heads."""
    sizes = 2, *q.shape[:2], k.shape[2], q.shape[3]
    return q.new_empty(sizes, dtype=torch.float32)


def _mask_lists(
    rows: Tensor,
    columns: Tensor,
    row_order: Tensor | None,
    column_order: Tensor | None,
    block_rows: int,
    block_columns: int,
    row_counts: Tensor | None,
    column_counts: Tensor | None,
) -> tuple[tuple, tuple]:
    """Lists as the backward kernels take them for "mask", which visits matched tiles alone."""
    orders, blocks = (row_order, column_order), (block_rows, block_columns)
    lists = tile_lists(rows, columns, *orders, *blocks, column_counts, row_counts)
    return tokens_of(lists.tiles), tokens_of(lists.counts)


def bwd_results(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Unwritten (dq, dk, dv, dstrength)."""
    batch, num_heads, seqlen_q, _ = q.shape
    dstrength = q.new_empty(batch, num_heads, seqlen_q, dtype=torch.float32)
    return empty_rows_like(q), empty_rows_like(k), empty_rows_like(v), dstrength


def fwd_config(q: Tensor, k: Tensor, ordered: bool = False) -> configs.Config:
    """The configuration of a forward call, which visits tokens in an order or not."""
    kind = configs.architecture(q.device), configs.precision(q)
    config = configs.layout_attention_fwd(*kind, q.shape[3], k.shape[2])
    heads = q.shape[0] * q.shape[1]
    config = configs.filling(config, q.shape[2], heads, configs.processors(q.device))
    if not autotune.requested():
        return config
    row = configs.row_at_once(*kind, k.shape[2])
    options = autotune.neighbours(config, fixed=("BLOCK_N", "parks") if row else ())
    ordered = ordered and not row  # which has no tiles to visit
    name, prepare = "row_fwd" if row else "fwd", partial(_fwd_launch, q, k, ordered)
    return autotune.best(name, q, k, options, prepare, ordered)


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
        options = autotune.neighbours(table, fixed=("parks",))
        return autotune.best(kernel, q, k, options, lambda: _bwd_launch(q, k, pair))

    by_query = tuned("bwd_q", by_query, lambda config: (config, by_key))
    return by_query, tuned("bwd_kv", by_key, lambda config: (by_query, config))


def _fwd_launch(q: Tensor, k: Tensor, ordered: bool) -> autotune.Launch:
    inputs, scale = autotune.example(q, k), q.shape[3] ** -0.5
    orders = (None, None)
    if ordered:
        orders = tuple(words.argsort(stable=True).to(torch.int32) for words in inputs[3:5])

    row = configs.row_at_once(configs.architecture(q.device), configs.precision(q), k.shape[2])

    def launch(config: configs.Config) -> Callable[[], object]:
        blocks = config.BLOCK_M, config.BLOCK_N
        lists = None if row else tile_lists(*inputs[3:5], *orders, *blocks)
        arguments = (*inputs, "range", scale, *orders)
        return lambda: layout_attention_fwd(*arguments, lists=lists, config=config)

    return launch


def _bwd_launch(q: Tensor, k: Tensor, pair: Callable[[configs.Config], tuple]) -> autotune.Launch:
    inputs, scale = autotune.example(q, k), q.shape[3] ** -0.5
    out, _, stats = layout_attention_fwd(*inputs, "range", scale)
    arguments = (out, None, *inputs, out, stats, "range", scale)
    return lambda config: lambda: layout_attention_bwd(*arguments, config=pair(config))


def fwd_tiles(q: Tensor, k: Tensor, ordered: bool = False) -> configs.Config | None:
    """The configuration of a forward call in tiles; None where a row of scores is one tile."""
    kind = configs.architecture(q.device), configs.precision(q)
    if k.shape[2] == 0 or configs.row_at_once(*kind, k.shape[2]):
        return None
    return fwd_config(q, k, ordered)


def fwd_blocks(q: Tensor, k: Tensor, ordered: bool = False) -> tuple[int, int] | None:
    """Rows and keys of a forward call's tiles, which lists made beforehand must share; None where
    it has no tiles.
    """
    config = fwd_tiles(q, k, ordered)
    return None if config is None else (config.BLOCK_M, config.BLOCK_N)


def fwd_results(q: Tensor, with_lse: bool, with_stats: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unwritten (out, lse, stats), [0] where they are not asked for."""
    rows = q.shape[:3]
    lse = q.new_empty(rows if with_lse else 0, dtype=torch.float32)
    stats = q.new_empty((*rows, STATS) if with_stats else 0, dtype=torch.float32)
    return empty_rows_like(q), lse, stats


def empty_rows_like(q: Tensor) -> Tensor:
    """In q's memory order, unless that leaves the last axis apart; other devices have the same
    rule.
    """
    like = torch.empty_like(q)
    if like.is_contiguous():
        return like
    return like if q.shape[3] == 1 or like.stride(3) == 1 else q.new_empty(q.shape)


@lru_cache(maxsize=256)
def _constants(
    kernel: str,
    architecture: str,
    precision: str,
    head_dim: int,
    modulation: str,
    negate: bool,
    group: int = 1,
) -> dict[str, object]:
    """The constants that a kernel is compiled for beside the tile."""
    first, second = head_parts(kernel, architecture, precision, head_dim)
    return {
        "MODULATION": modulation,
        "NEGATE": negate,
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
        "HEAD_DIM": head_dim,
        "PART_0": first,
        "PART_1": second,
        **({"GROUP": group} if group > 1 else {}),
    }
