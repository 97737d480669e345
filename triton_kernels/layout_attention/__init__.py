"""Layout attention's launchers, named and called as the native ops are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dense_attn.triton_kernels import autotune, configs
from dense_attn.triton_kernels.layout_attention import fwd_specialised
from dense_attn.triton_kernels.layout_attention.arguments import (
    BwdPlan,
    FwdPlan,
    at,
    bwd_plan,
    counted,
    fwd_plan,
    numbers_at,
    packed_plan,
    tokens_of,
)
from dense_attn.triton_kernels.layout_attention.bwd_kv import layout_attention_bwd_kv_kernel
from dense_attn.triton_kernels.layout_attention.bwd_q import layout_attention_bwd_q_kernel
from dense_attn.triton_kernels.layout_attention.fwd import layout_attention_fwd_kernel
from dense_attn.triton_kernels.layout_attention.lists import tile_lists
from dense_attn.triton_kernels.layout_attention.row_fwd import layout_attention_row_fwd_kernel


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
    # `TileLists` of these words and orders and of `fwd_blocks`, or nothing
    tiles: Tensor | None = None,
    counts: Tensor | None = None,
    k_words: Tensor | None = None,
    every_strength: float = 1.0,  # of all rows, where strength is None
    with_lse: bool = True,
    with_stats: bool = True,
    seqlens_k: Tensor | None = None,  # int32 [B]
    plan: FwdPlan | None = None,  # of this call's form
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, stats) of `reference.layout_attention`; stats is what the backward pass needs of
    each row. What is not asked for is empty.
    """
    if plan is None:
        tokens, asked = (q_regions, k_regions, strength), (every_strength, with_lse, with_stats)
        visits = q_order, k_order, tiles, counts, k_words
        plan = plan_fwd(q, k, v, *tokens, modulation, scale, *visits, *asked, seqlens_k)
    new = q.new_empty_strided  # takes less time than its kin
    out = new(*plan.out)
    lse, stats = new(*plan.lse, dtype=torch.float32), new(*plan.stats, dtype=torch.float32)
    if plan.config is None:
        return out.zero_(), lse.fill_(-torch.inf), stats.fill_(-torch.inf)
    config, (rows, keys, values, own), tokens = plan.config, plan.rows, plan.tokens
    results = (out, *own), lse if with_lse else None, stats if with_stats else None
    numbers, there = (*plan.sizes, abs(scale)), counted(seqlens_k)
    inputs = (q, *rows), (k, *keys), (v, *values), at(q_regions, tokens[0])
    strengths = numbers_at(strength, every_strength, plan.strength)
    if plan.row:
        tensors = (*inputs, at(k_regions, tokens[1]), strengths, *results)
        layout_attention_row_fwd_kernel[plan.grid](*tensors, *numbers, **plan.options, **there)
        return out, lse, stats
    if tiles is None:
        blocks = config.BLOCK_M, config.BLOCK_N
        lists = tile_lists(q_regions, k_regions, q_order, k_order, *blocks, seqlens_k)
        lists = map(tokens_of, lists)
    else:
        lists = map(at, (tiles, counts, k_words), tokens[4:])
    visits = (at(q_order, tokens[2]), at(k_order, tokens[3]), strengths, *lists)
    if plan.specialised is not None:
        fwd_specialised.launch(inputs, visits, results, abs(scale), plan, there)
        return out, lse, stats
    parked = plan.parked and new(*plan.parked, dtype=torch.float32)
    tensors = (*inputs, *visits, *results, parked)
    layout_attention_fwd_kernel[plan.grid](*tensors, *numbers, **plan.options, **there)
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
    plan: BwdPlan | None = None,  # of this call's form
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dstrength) of `reference.layout_attention`, the same bits on every run."""
    if modulation != "mask":
        q_order = k_order = None  # every pair counts, so no order of theirs saves any
    if plan is None:
        tokens, rule = (q, k, v, q_regions, k_regions, strength), (modulation, scale)
        visits = q_order, k_order
        plan = plan_bwd(grad_out, grad_lse, *tokens, out, stats, *rule, *visits)
    new, (by_q, by_k, by_v) = q.new_empty_strided, plan.grads
    dq, dk, dv = new(*by_q), new(*by_k), new(*by_v)
    dstrength = new(*plan.dstrength, dtype=torch.float32)
    if plan.configs is None:
        return dq.zero_(), dk.zero_(), dv.zero_(), dstrength.zero_()
    numbers = new(*plan.numbers, dtype=torch.float32)
    places = new(*plan.places, dtype=torch.int32)
    sizes, there = (*plan.sizes, abs(scale)), counted(seqlens_k)
    q_words, k_words, by_q_order, by_k_order = plan.tokens
    rows = tuple(map(at, (q, k, v), plan.rows))
    grad_rows, out_rows, dq_rows = map(at, (grad_out, out, dq), plan.rows[3:])
    visits = at(k_regions, k_words), at(q_order, by_q_order), at(k_order, by_k_order)
    (by_query, by_key), lists = plan.configs, (None, None)
    if modulation == "mask":
        tokens = (q_regions, k_regions, q_order, k_order)
        lists = _mask_lists(*tokens, by_query.BLOCK_M, by_query.BLOCK_N, None, seqlens_k)
    inputs = (*rows, at(q_regions, q_words), *visits)
    saved = (numbers_at(strength, every_strength, plan.strength), out_rows, stats)
    results = (dq_rows, dstrength, numbers, places)
    tensors = (grad_rows, at(grad_lse, plan.grad_lse), *inputs, *saved, *lists, *results)
    layout_attention_bwd_q_kernel[plan.grids[0]](*tensors, *sizes, **plan.options[0], **there)
    if modulation == "mask":
        tokens = (k_regions, q_regions, k_order, q_order)
        lists = _mask_lists(*tokens, by_key.BLOCK_N, by_key.BLOCK_M, seqlens_k, None)
    parts = dk, dv
    if plan.apart is not None:  # room for those of heads and shares, to be summed in their order
        parts = new(*plan.apart, dtype=torch.float32)
    results = (numbers, places, *lists, *map(at, parts, plan.keys_grads))
    tensors = (grad_rows, *rows, *visits, *results)
    layout_attention_bwd_kv_kernel[plan.grids[1]](*tensors, *sizes, **plan.options[1], **there)
    if plan.apart is not None:
        for grad, total in zip((dk, dv), parts.unflatten(2, (k.shape[1], -1)).sum(3)):
            grad.copy_(total)
    return dq, dk, dv, dstrength


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


def plan_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    strength: Tensor | None,
    modulation: str,
    scale: float,
    q_order: Tensor | None,
    k_order: Tensor | None,
    tiles: Tensor | None,
    counts: Tensor | None,
    k_words: Tensor | None,
    every_strength: float = 1.0,
    with_lse: bool = True,
    with_stats: bool = True,
    seqlens_k: Tensor | None = None,
    config: configs.Config | None = None,
) -> FwdPlan:
    """The plan of a forward call, in a configuration or in the one that it is to have."""
    if q.numel() * k.shape[2] == 0:
        config = None
    elif config is None:
        config = fwd_config(q, k, q_order is not None or k_order is not None)
    tokens = q_regions, k_regions, q_order, k_order, tiles, counts, k_words
    how = modulation, scale < 0, with_lse, with_stats
    plan = fwd_plan(q, k, v, strength, tokens, *how, config)
    if config is None or plan.row or not config.specialised:
        return plan
    return plan._replace(specialised=packed_plan(q, k, v, strength, k_order, seqlens_k, plan))


def plan_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    strength: Tensor | None,
    out: Tensor,
    stats: Tensor,
    modulation: str,
    scale: float,
    q_order: Tensor | None,
    k_order: Tensor | None,
    every_strength: float = 1.0,
    seqlens_k: Tensor | None = None,
    config: tuple[configs.Config, configs.Config] | None = None,
) -> BwdPlan:
    """The plan of a backward call, in configurations or in those that it is to have."""
    config = None if q.numel() * k.shape[2] == 0 else config or bwd_config(q, k)
    tokens = q_regions, k_regions, q_order, k_order
    given = grad_out, grad_lse, q, k, v, out, strength, tokens
    return bwd_plan(*given, modulation, scale < 0, config)


def fwd_config(q: Tensor, k: Tensor, ordered: bool = False) -> configs.Config:
    """The configuration of a forward call, which visits tokens in an order or not."""
    return _fwd_config((configs.architecture(q.device), configs.precision(q)), q, k, ordered)


def _fwd_config(kind: tuple[str, str], q: Tensor, k: Tensor, ordered: bool) -> configs.Config:
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
    kind = configs.architecture(q.device), configs.precision(q)
    by_query, by_key = configs.layout_attention_bwd(*kind, q.shape[3])
    heads, processors = q.shape[0] * q.shape[1], configs.processors(q.device)
    by_query = configs.filling(by_query, q.shape[2], heads, processors)
    by_key = configs.filling(by_key, k.shape[2], heads, processors, "BLOCK_N")
    by_key = configs.splitting(by_key, q.shape[2], k.shape[2], heads, processors)
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
        lists = (None,) * 3 if row else tile_lists(*inputs[3:5], *orders, *blocks)
        arguments = (*inputs, "range", scale, *orders, *lists)
        plan = plan_fwd(*arguments, config=config)  # not a part of what is measured
        return lambda: layout_attention_fwd(*arguments, plan=plan)

    return launch


def _bwd_launch(q: Tensor, k: Tensor, pair: Callable[[configs.Config], tuple]) -> autotune.Launch:
    inputs, scale = autotune.example(q, k), q.shape[3] ** -0.5
    out, _, stats = layout_attention_fwd(*inputs, "range", scale)
    arguments = (out, None, *inputs, out, stats, "range", scale, None, None)

    def launch(config: configs.Config) -> Callable[[], object]:
        plan = plan_bwd(*arguments, config=pair(config))
        return lambda: layout_attention_bwd(*arguments, plan=plan)

    return launch


def fwd_tiles(q: Tensor, k: Tensor, ordered: bool = False) -> configs.Config | None:
    """The configuration of a forward call in tiles; None where a row of scores is one tile."""
    kind = configs.architecture(q.device), configs.precision(q)
    if k.shape[2] == 0 or configs.row_at_once(*kind, k.shape[2]):
        return None
    return _fwd_config(kind, q, k, ordered)


def fwd_blocks(q: Tensor, k: Tensor, ordered: bool = False) -> tuple[int, int] | None:
    """Rows and keys of a forward call's tiles, which lists made beforehand must share; None where
    it has no tiles.
    """
    config = fwd_tiles(q, k, ordered)
    return None if config is None else (config.BLOCK_M, config.BLOCK_N)
