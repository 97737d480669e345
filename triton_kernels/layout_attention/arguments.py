"""Tensors as layout attention's kernels take them, a pointer and strides; and plans: what follows
from the form of a call, which is found out once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels.layout_attention.records import NUMBERS, PLACES, STATS
from dense_attn.triton_kernels.parts import head_parts, next_power_of_2

Sizes = tuple[int, ...]
Strides = tuple[int | tl.constexpr, ...]
Room = tuple[Sizes, Sizes]  # the shape and the strides of a tensor that is to be made
_GRAIN, _ONE = tl.constexpr(configs.GRAIN), tl.constexpr(1)


class PackedPlan(NamedTuple):
    """The part of a `FwdPlan` for specialised warps, to which keys and values come through tensor
    maps.
    """

    in_place: bool  # whether maps can be of keys and values that begin at a multiple of 16 bytes
    packed: Room  # else: of keys, and of values, in the order of visits
    words: Room | None  # of the keys' words up to a whole tile, where the keys end within one
    plain: Room | None  # else: of what tells tiles of queries without strength
    map: TensorDescriptor  # like those of keys and values, but of no memory
    pack_grid: tuple[int, int]
    pack_sizes: Sizes  # heads of k, M, N, and N up to a whole tile
    pack_options: dict[str, object]
    options: dict[str, object]


class FwdPlan(NamedTuple):
    """The consequences of a forward call's form; without a configuration it launches nothing."""

    out: Room
    lse: Room
    stats: Room
    config: configs.Config | None = None
    row: bool = False  # whether a row of scores is one tile
    grid: tuple[int] = (0,)
    sizes: Sizes = ()  # H, M and N
    rows: tuple[Strides, ...] = ()  # of q, k, v and out
    tokens: tuple[Strides | None, ...] = ()  # of the words, the orders and the lists
    strength: Strides | None = None
    parked: Room | None = None  # of what waits in memory for the end of the kernel
    options: dict[str, object] | None = None  # constants, and those of the configuration
    specialised: PackedPlan | None = None


class BwdPlan(NamedTuple):
    """The consequences of a backward call's form; without configurations it launches nothing."""

    grads: tuple[Room, Room, Room]  # of q, k and v
    dstrength: Room
    # of the passes over query tiles and over key tiles
    configs: tuple[configs.Config, configs.Config] | None = None
    grids: tuple[Sizes, Sizes] = ((0,), (0,))
    sizes: Sizes = ()  # H, M and N
    rows: tuple[Strides, ...] = ()  # of q, k, v, grad_out, out and dq
    keys_grads: tuple[Strides, ...] = ()  # of dk and dv
    tokens: tuple[Strides | None, ...] = ()  # of the words and the orders
    strength: Strides | None = None
    grad_lse: Strides | None = None
    numbers: Room = ((), ())
    places: Room = ((), ())
    # of dk and dv of each head of q and each share of its rows, where several meet one of k
    apart: Room | None = None
    options: tuple[dict[str, object], ...] = ()


def fwd_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    tokens: tuple[Tensor | None, ...],  # the words, the orders and the lists
    modulation: str,
    negate: bool,
    with_lse: bool,
    with_stats: bool,
    config: configs.Config | None,
) -> FwdPlan:
    """The plan of a forward call in a configuration, None where there are no rows or no keys."""
    shape, rows = q.shape, q.shape[:3]
    out = _like(q)
    stats = (*rows, STATS) if with_stats else (0,)
    results = out, _room(*(rows if with_lse else (0,))), _room(*stats)
    if config is None:
        return FwdPlan(*results)
    kind = configs.architecture(q.device), configs.precision(q)
    row = tokens[4] is None and configs.row_at_once(*kind, k.shape[2])
    constants = _constants("row_fwd" if row else "fwd", kind, q, k, modulation, negate)
    if row:
        constants["PTX"] = kind[0].startswith("sm_")
    parked = None
    if config.parks and modulation != "mask" and not row:
        parked = _room(*rows, constants["PART_0"] + constants["PART_1"])
    return FwdPlan(
        *results,
        config=config,
        row=row,
        grid=(shape[0] * shape[1] * -(-shape[2] // config.BLOCK_M),),
        sizes=(shape[1], shape[2], k.shape[2]),
        rows=(*map(_of_rows, (q, k, v)), _grains(*out)),
        tokens=tuple(map(_of_tokens, tokens)),
        strength=_of_rows(strength),
        parked=parked,
        options=constants | config.launch,
    )


def packed_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Tensor | None,
    k_order: Tensor | None,
    seqlens_k: Tensor | None,
    plan: FwdPlan,
) -> PackedPlan:
    """The part of a call's plan that is for specialised warps, from the rest of it."""
    (batch, key_heads, seqlen_k, head_dim), seqlen_q, config = k.shape, q.shape[2], plan.config
    padded = -(-seqlen_k // config.BLOCK_N) * config.BLOCK_N
    tokens = batch * key_heads * padded
    if tokens >= 2**31:  # a place in a tensor map is an int32
        raise ValueError(f"k must have fewer than 2**31 tokens in all heads, got {tokens}")
    ends, plain = padded != seqlen_k or seqlens_k is not None, None
    if strength is not None and plan.options["MODULATION"] != "mask":
        plain = _room(batch * q.shape[1], -(-seqlen_q // config.BLOCK_M))
    part, packed = max(16, next_power_of_2(head_dim)), _room(tokens, head_dim)
    whole, box = k.new_empty_strided(*packed, device="meta"), [config.BLOCK_N, part]
    both = {"HEAD_DIM": head_dim, "PART": part, "GROUP": q.shape[1] // key_heads}
    own = {name: plan.options[name] for name in ("MODULATION", "NEGATE")}
    ways = {"STAGES": config.num_stages, "ENDS": ends, "COMPILED": not configs.interpreted()}
    return PackedPlan(
        in_place=k_order is None and not ends and k.is_contiguous() and v.is_contiguous(),
        packed=packed,
        words=_room(batch, padded) if ends else None,
        plain=plain,
        map=TensorDescriptor(whole, [tokens, head_dim], [head_dim, 1], box),
        pack_grid=(tokens // config.BLOCK_N, 2),
        pack_sizes=(key_heads, seqlen_q, seqlen_k, padded),
        pack_options=both | {"BLOCK_M": config.BLOCK_M, "BLOCK": config.BLOCK_N},
        options=both | own | ways | config.launch,
    )


def bwd_plan(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    strength: Tensor | None,
    tokens: tuple[Tensor | None, ...],  # the words and the orders
    modulation: str,
    negate: bool,
    pair: tuple[configs.Config, configs.Config] | None,
) -> BwdPlan:
    """The plan of a backward call in its configurations, None where there is nothing to do."""
    (batch, num_heads, seqlen_q, head_dim), seqlen_k = q.shape, k.shape[2]
    grads = tuple(map(_like, (q, k, v)))
    if pair is None:
        return BwdPlan(grads, _room(*q.shape[:3]))
    by_query, by_key = pair
    kind = configs.architecture(q.device), configs.precision(q)
    constants = [_constants(of, kind, q, k, modulation, negate) for of in ("bwd_q", "bwd_kv")]
    rows = by_query.BLOCK_M, by_key.BLOCK_N  # of the tiles that a program keeps
    ahead = [{"AHEAD": _ahead(kind, *of)} for of in zip(pair, rows)]
    # Conditions of every other row, by the count: sm_80 has masks of bits all the same.
    ahead[1]["APART"] = kind[0] == "sm_90"
    tiles = -(-seqlen_q // by_query.BLOCK_M), -(-seqlen_k // by_key.BLOCK_N)
    counts = [(batch * num_heads * count,) for count in tiles]
    apart, keys_grads, shares = None, grads[1:], num_heads * by_key.splits
    if by_key.splits > 1:
        counts[1] += (by_key.splits,)
    if shares > k.shape[1]:
        apart = _room(2, batch, shares, seqlen_k, head_dim)
        keys_grads = (_room(*apart[0][1:]),) * 2
    return BwdPlan(
        grads,
        _room(*q.shape[:3]),
        configs=pair,
        grids=tuple(counts),
        sizes=(num_heads, seqlen_q, seqlen_k),
        rows=(*map(_of_rows, (q, k, v, grad_out, out)), _grains(*grads[0])),
        keys_grads=tuple(_grains(*like) for like in keys_grads),
        tokens=tuple(map(_of_tokens, tokens)),
        strength=_of_rows(strength),
        grad_lse=_of_rows(grad_lse),
        numbers=_room(batch, num_heads, NUMBERS, seqlen_q),
        places=_room(batch, num_heads, PLACES, seqlen_q),
        apart=apart,
        options=tuple(x | y | z.launch for x, y, z in zip(ahead, constants, pair)),
    )


def _ahead(kind: tuple[str, str], config: configs.Config, rows: int) -> str:
    """How numbers that are needed in two orders come ahead. Products of warp groups, of 64 rows at
    least, take both from shared memory, so that one is made from the other; the others take numbers
    one by one, in any order, but the compiler then copies nothing ahead.
    """
    if kind[1] != "tf32" or config.num_stages == 1:
        return "as they are"
    return "turned" if kind[0] == "sm_90" and rows >= 64 else "loaded"


def at(x: Tensor | None, strides: Strides | None) -> tuple | None:
    """A tensor as kernels take it, by the strides of a plan."""
    return None if x is None else (x, *strides)


def _of_rows(x: Tensor | None) -> Strides | None:
    """The strides of [B, H, tokens, ...] as kernels take them."""
    return None if x is None else _grains(x.shape, x.stride())


def _grains(shape: Sizes, strides: Sizes) -> Strides:
    """Strides in grains where all are some, without the last axis's; rows begin within 2**32 grains
    and are less than 2**31 elements apart.
    """
    batch, num_heads, tokens = shape[:3]
    a, b, c = strides[:3]
    a, b, c = a if batch > 1 else 0, b if num_heads > 1 else 0, c if tokens > 1 else 0
    if (a | b | c) % configs.GRAIN == 0 and (tokens - 1) * c < configs.GRAIN << 32 and c < 1 << 31:
        return a // configs.GRAIN, b // configs.GRAIN, c // configs.GRAIN, _GRAIN
    return a, b, c, _ONE


def tokens_of(x: Tensor | None) -> tuple[Tensor, int, int] | None:
    """[tokens] or [B|1, tokens, ...] as kernels take it: the tensor and two strides, 0 where
    samples share one row.
    """
    return at(x, _of_tokens(x))


def _of_tokens(x: Tensor | None) -> Strides | None:
    if x is None:
        return None
    if x.dim() == 1:
        return 0, x.stride(0)
    return x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def counted(seqlens_k: Tensor | None) -> dict[str, tuple[Tensor, int]]:
    """How many keys of each sample are there, int32 [B], as kernels take it beside the others."""
    return {} if seqlens_k is None else {"seqlens": (seqlens_k, seqlens_k.stride(0))}


def numbers_at(
    x: Tensor | None, every: float, strides: Strides | None
) -> tuple[Tensor | None, float | int, int, int, tl.constexpr]:
    """Numbers [B, H, tokens] as kernels take them; without a tensor, the one that all rows have."""
    return (None, every, 0, 0, _ONE) if x is None else (x, *strides)


def _room(*shape: int) -> Room:
    """Room without gaps."""
    return shape, torch.empty(shape, dtype=torch.float32, device="meta").stride()


def _like(q: Tensor) -> Room:
    """Room for rows in q's memory order, unless that leaves the last axis apart."""
    like = torch.empty_like(q, device="meta")
    if q.shape[3] != 1 and like.stride(3) != 1:
        like = like.contiguous()
    return like.shape, like.stride()


def _constants(
    kernel: str, kind: tuple[str, str], q: Tensor, k: Tensor, modulation: str, negate: bool
) -> dict[str, object]:
    """The constants that a kernel is compiled for beside the tile."""
    first, second = head_parts(kernel, *kind, q.shape[3])
    group = q.shape[1] // k.shape[1]  # heads of q that meet one head of k
    return {
        "MODULATION": modulation,
        "NEGATE": negate,
        "PRECISION": "tf32" if kind[1] == "tf32" else "ieee",
        "HEAD_DIM": q.shape[3],
        "PART_0": first,
        "PART_1": second,
        **({"GROUP": group} if group > 1 else {}),
    }
