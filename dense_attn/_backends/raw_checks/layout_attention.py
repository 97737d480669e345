"""The checks of raw calls of layout attention and of tile lists."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends.contract import MAX_HEAD_DIM, MODULATIONS, STATS
from dense_attn._backends.raw_checks._refusals import of_a_raw_call, one_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCKS = (16, 32, 64, 128, 256)  # tokens of a tile
LARGEST = _checks.LARGEST[torch.float32]


@of_a_raw_call
def layout_attention_fwd(
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
) -> None:
    """Refuse what the kernels cannot run on, but for the shapes of the tile lists: `lists`."""
    _inputs(q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order)
    _every_strength(every_strength)
    if seqlens_k is not None:
        _seqlens(seqlens_k, q.shape[0], k.shape[2], q)
    given = 3 - (tiles is None) - (counts is None) - (k_words is None)
    if given not in (0, 3):
        _checks.refuse("tile_lists", "be 3 tensors", given)


@of_a_raw_call
def layout_attention_bwd(
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
) -> None:
    """Refuse what the kernels cannot run on."""
    _inputs(q, k, v, q_regions, k_regions, strength, modulation, scale, q_order, k_order)
    _every_strength(every_strength)
    shape, dtype = q.shape, q.dtype
    if seqlens_k is not None:
        _seqlens(seqlens_k, shape[0], k.shape[2], q)
    rows = shape[:3]
    _rows("grad_out", grad_out, q, shape, dtype)
    _rows("out", out, q, shape, dtype)
    _rows("stats", stats, q, (*rows, STATS))
    if not stats.is_contiguous():
        _checks.refuse("stats", "be contiguous", f"strides {stats.stride()}")
    if grad_lse is not None:
        _rows("grad_lse", grad_lse, q, rows)


@of_a_raw_call
def tile_lists(
    q_regions: Tensor,
    k_regions: Tensor,
    q_order: Tensor | None,
    k_order: Tensor | None,
    block_m: int,
    block_n: int,
    seqlens_k: Tensor | None = None,
) -> None:
    """Refuse words, orders and tiles of which no lists can be made."""
    for name, words in (("q_regions", q_regions), ("k_regions", k_regions)):
        if words.dim() not in (1, 2):
            _checks.refuse(name, "have 1 or 2 dimensions", tuple(words.shape))
    tokens = (q_regions, k_regions, q_order, k_order)
    batch = max([x.shape[0] for x in tokens if x is not None and x.dim() == 2], default=1)
    if seqlens_k is not None:
        batch = max(batch, seqlens_k.numel())
        _seqlens(seqlens_k, batch, k_regions.shape[-1], q_regions)
    for name, words in (("q_regions", q_regions), ("k_regions", k_regions)):
        _checks.token_words(name, words, batch, words.shape[-1], q_regions)
    for name, order, words in (("q_order", q_order, q_regions), ("k_order", k_order, k_regions)):
        if order is not None:
            _order(name, order, batch, words.shape[-1], q_regions)
    for name, block in (("block_m", block_m), ("block_n", block_n)):
        if block not in BLOCKS:
            _checks.refuse(name, f"be one of {', '.join(map(str, BLOCKS))}", block)


@of_a_raw_call
def lists(
    tensors: tuple[Tensor, Tensor, Tensor], q: Tensor, k: Tensor, blocks: tuple[int, int] | None
) -> None:
    """Require the shapes that `tile_lists` gives; what the lists say is the caller's affair."""
    if blocks is None:
        got = f"{len(tensors)} tensors for {k.shape[2]} keys"
        _checks.refuse("tile_lists", "be None for so few keys", got)
    block_m, block_n = blocks
    batch, seqlen_k = q.shape[0], k.shape[2]
    query_tiles, key_tiles = -(-q.shape[2] // block_m), -(-seqlen_k // block_n)
    shapes = ((query_tiles, 2, key_tiles), (query_tiles, 3), (seqlen_k,))
    if _lists_fit(tensors, q, batch, shapes):
        return
    for x, shape in zip(tensors, shapes):
        if x.dtype != torch.int32:
            _checks.refuse("tile_lists", "be int32", _checks.name(x.dtype), TypeError)
        found = x.shape
        if (found != (1, *shape) and found != (batch, *shape)) or not x.is_contiguous():
            rule = f"have contiguous tensors of shape [1 or B, {', '.join(map(str, shape))}]"
            _checks.refuse("tile_lists", rule, tuple(x.shape))
        _checks.same_device("tile_lists", x, q)


def _lists_fit(
    tensors: tuple[Tensor, Tensor, Tensor], q: Tensor, batch: int, shapes: tuple[tuple, ...]
) -> bool:
    """Whether one look finds nothing to refuse in lists of one sample, or of each."""
    tiles, counts, words = tensors
    own, (tile, count, key), device = tiles.shape[0], shapes, q.device
    return (
        (own == 1 or own == batch)
        and tiles.shape == (own, *tile)
        and counts.shape == (own, *count)
        and words.shape == (own, *key)
        and tiles.dtype is counts.dtype is words.dtype is torch.int32
        and tiles.is_contiguous()
        and counts.is_contiguous()
        and words.is_contiguous()
        and tiles.device == counts.device == words.device == device
    )


def _inputs(
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
) -> None:
    """Require what both passes rely on."""
    _checks.attention_inputs(q, k, v)
    one_of("q", q.dtype, DTYPES)
    shape = q.shape
    batch, _, seqlen_q, head_dim = shape
    seqlen_k = k.shape[2]
    if head_dim > MAX_HEAD_DIM:
        _checks.refuse("q", f"have a head dim of 1 to {MAX_HEAD_DIM}", head_dim)
    _checks.choice("modulation", modulation, MODULATIONS)
    if not math.isfinite(scale):
        _checks.refuse("scale", "be finite", scale)
    if strength is not None:
        _rows("strength", strength, q, shape[:3])
    _checks.token_words("q_regions", q_regions, batch, seqlen_q, q)
    _checks.token_words("k_regions", k_regions, batch, seqlen_k, q)
    if q_order is not None:
        _order("q_order", q_order, batch, seqlen_q, q)
    if k_order is not None:
        _order("k_order", k_order, batch, seqlen_k, q)


@of_a_raw_call
def values(
    k: Tensor, q_order: Tensor | None, k_order: Tensor | None, seqlens_k: Tensor | None = None
) -> None:
    """Refuse orders that are no permutations and counts of more keys than there are."""
    if q_order is not None:
        _permutation("q_order", q_order)
    if k_order is not None:
        _permutation("k_order", k_order)
    if seqlens_k is not None:
        _counts(seqlens_k, k.shape[2])


def _every_strength(number: float) -> None:
    """Require a strength that float32 holds."""
    if not abs(number) <= LARGEST:
        _checks.refuse("every_strength", "be finite in float32", number)


def _seqlens(counts: Tensor, batch: int, seqlen_k: int, like: Tensor) -> None:
    """Require int32 [B]; what they say is looked at on the CPU alone, and kernels bound it."""
    _checks.token_words("seqlens_k", counts, batch, batch, like)
    if counts.dim() != 1:
        _checks.refuse("seqlens_k", f"have shape [{batch}]", tuple(counts.shape))
    _counts(counts, seqlen_k)


def _counts(counts: Tensor, seqlen_k: int) -> None:
    """A look at values, on the CPU alone."""
    if counts.is_cpu and ((counts < 0) | (counts > seqlen_k)).any():
        _checks.refuse("seqlens_k", f"count 0 to {seqlen_k} keys", counts.tolist())


def _rows(
    name: str, x: Tensor, q: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> None:
    """Require x [B, H, M] or [B, H, M, columns] of a dtype on q's device."""
    same = x.dtype is dtype and x.shape == shape and x.device == q.device
    if same and x.layout is torch.strided and x.is_contiguous():
        return
    _checks.tensor(name, x)
    if x.dtype != dtype:
        _checks.refuse(name, f"be {_checks.name(dtype)}", _checks.name(x.dtype), TypeError)
    if x.shape != shape:
        _checks.refuse(name, f"have shape {tuple(shape)}", tuple(x.shape))
    if not x.is_contiguous() and len(shape) == 4 and shape[3] > 1 and x.stride(3) != 1:
        _checks.refuse(name, "have a contiguous last dimension", f"strides {x.stride()}")
    _checks.same_device(name, x, q)


def _order(name: str, order: Tensor, batch: int, num_tokens: int, like: Tensor) -> None:
    """Require a permutation of the tokens."""
    _checks.token_words(name, order, batch, num_tokens, like)
    _permutation(name, order)


def _permutation(name: str, order: Tensor) -> None:
    """A look at values, on the CPU alone: a row that no place names would stay unwritten."""
    if not order.is_cpu:
        return
    tokens = torch.arange(order.shape[-1], dtype=order.dtype, device=order.device).expand_as(order)
    wrong = order.sort(-1).values != tokens
    if wrong.any():
        _checks.refuse(name, "be a permutation of the tokens", order.tolist())
