"""The raw ops: the schema of each, and its fake kernel, which says the shapes, dtypes and memory
order of results that no backend chooses for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn._backends.contract import SCHEMAS, STATS
from dense_attn._dtypes import accumulation_dtype


def check_devices(first: Tensor, **others: Tensor | None) -> None:
    """One meta tensor among real ones brings a call here, whose results would have no values."""
    for name, other in others.items():
        if other is not None and other.device != first.device:
            raise RuntimeError(
                f"{name} must be on {first.device} like the first tensor, got {other.device}"
            )


def _empty_rows_like(q: Tensor) -> Tensor:
    """Rows in q's memory order, unless that leaves the last axis apart: the kernels' rule too."""
    like = torch.empty_like(q)
    return like if q.shape[3] == 1 or like.stride(3) == 1 else q.new_empty(q.shape)


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
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, stats), the latter [0] where they are not asked for; k_order and the tile lists
    are for kernels that take them. Of each sample's keys the first seqlens_k are there, which an
    order has in front.
    """
    words = {"q_regions": q_regions, "k_regions": k_regions}
    orders = {"q_order": q_order, "k_order": k_order}
    lists = {"tiles": tiles, "counts": counts, "k_words": k_words, "seqlens_k": seqlens_k}
    check_devices(q, k=k, v=v, strength=strength, **words, **orders, **lists)
    rows, dtype = q.shape[:3], accumulation_dtype(q.dtype)
    lse = q.new_empty(rows if with_lse else (0,), dtype=dtype)
    stats = q.new_empty((*rows, STATS) if with_stats else (0,), dtype=dtype)
    return _empty_rows_like(q), lse, stats


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dstrength); k_order is for kernels that take it."""
    words = {"q_regions": q_regions, "k_regions": k_regions}
    orders = {"q_order": q_order, "k_order": k_order}
    saved = {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "stats": stats}
    orders["seqlens_k"] = seqlens_k
    check_devices(q, k=k, v=v, strength=strength, **words, **orders, **saved)
    grads = [_empty_rows_like(x) for x in (q, k, v)]
    return *grads, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


def tile_lists(
    q_regions: Tensor,
    k_regions: Tensor,
    q_order: Tensor | None,
    k_order: Tensor | None,
    block_m: int,
    block_n: int,
    seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(tiles, counts, k_words)."""
    orders = {"q_order": q_order, "k_order": k_order}
    check_devices(q_regions, k_regions=k_regions, **orders, seqlens_k=seqlens_k)
    rows, columns = _samples(q_regions, q_order), _samples(k_regions, k_order)
    columns = columns if seqlens_k is None else max(columns, seqlens_k.shape[0])
    query_tiles, key_tiles = -(-q_regions.shape[-1] // block_m), -(-k_regions.shape[-1] // block_n)
    shape = (max(rows, columns) if min(rows, columns) else 0, query_tiles)
    tiles, counts = (q_regions.new_empty((*shape, *last)) for last in ((2, key_tiles), (3,)))
    return tiles, counts, k_regions.new_empty((columns, k_regions.shape[-1]))


def _samples(*tokens: Tensor | None) -> int:
    """The samples of [tokens] or [B|1, tokens] tensors that go together."""
    return max([x.shape[0] for x in tokens if x is not None and x.dim() == 2], default=1)


def percentile_mask(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """(masked, threshold)."""
    wide = accumulation_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(x.shape[:1], dtype=wide)


def sega_guidance(
    eps_uncond: Tensor,
    eps_text: Tensor,
    eps_edits: Tensor,
    momentum: Tensor,
    *,
    user_mask: Tensor | None,
    sum_channels: bool,
    **numbers: object,
) -> tuple[Tensor, Tensor, Tensor]:
    """(eps, momentum_out, thresholds)."""
    check_devices(
        eps_uncond, eps_text=eps_text, eps_edits=eps_edits, momentum=momentum, user_mask=user_mask
    )
    batch, channels = eps_uncond.shape[:2]
    wide = accumulation_dtype(eps_uncond.dtype)
    rows = (len(eps_edits), batch, 1 if sum_channels else channels)
    eps = eps_uncond.new_empty(eps_uncond.shape)
    return eps, eps.new_empty(eps.shape, dtype=wide), eps.new_empty(rows, dtype=wide)


def ddim_step(
    x: Tensor, eps: Tensor, eps_uncond: Tensor | None, a: float, b: float, guidance_scale: float
) -> Tensor:
    """The new x."""
    check_devices(x, eps=eps, eps_uncond=eps_uncond)
    return torch.empty_like(x)


def leapfrog_step(
    far: Tensor, near: Tensor, eps: Tensor, c_far: float, c_near: float, c_eps: float
) -> Tensor:
    """The new far."""
    check_devices(far, near=near, eps=eps)
    return torch.empty_like(far)


def edict_mix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    """(x, y)."""
    check_devices(x, y=y, eps=eps)
    return torch.empty_like(x), torch.empty_like(y)


def exact_couple(
    z: Tensor, eps: Tensor, step: float, to_latent: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(z, latent)."""
    check_devices(z, eps=eps)
    return torch.empty_like(z), torch.empty_like(z, dtype=dtype)


def exact_leapfrog(
    far: Tensor,
    near: Tensor,
    eps: Tensor,
    c_near: float,
    c_eps: float,
    to_latent: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(z, latent)."""
    check_devices(far, near=near, eps=eps)
    return torch.empty_like(far), torch.empty_like(far, dtype=dtype)


def exact_mix(
    x: Tensor,
    y: Tensor,
    eps: Tensor | None,
    step: float,
    mix: float,
    couple_x: bool,
    to_latent: float,
    latent_x: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x, y, latent)."""
    check_devices(x, y=y, eps=eps)
    return torch.empty_like(x), torch.empty_like(y), torch.empty_like(x, dtype=dtype)


class Op(NamedTuple):
    """A raw op as a library is told of it."""

    schema: str
    fake: Callable


FAKES = {
    "layout_attention_fwd": layout_attention_fwd,
    "layout_attention_bwd": layout_attention_bwd,
    "tile_lists": tile_lists,
    "percentile_mask": percentile_mask,
    "sega_guidance": sega_guidance,
    "ddim_step": ddim_step,
    "leapfrog_step": leapfrog_step,
    "edict_mix": edict_mix,
    "edict_unmix": edict_mix,
    "exact_couple": exact_couple,
    "exact_leapfrog": exact_leapfrog,
    "exact_mix": exact_mix,
    "exact_unmix": exact_mix,
}
OPS = {name: Op(schema, FAKES[name]) for name, schema in SCHEMAS.items()}


def _refusing_none(op: str, schema: str, fake: Callable) -> Callable:
    """The fake behind a look for None in the place of a tensor, which torch lets through."""
    arguments = torch._C.parse_schema(op + schema).arguments
    names = [argument.name for argument in arguments]
    required = {argument.name for argument in arguments if str(argument.type) == "Tensor"}

    @wraps(fake)
    def checked(*given: object, **named: object) -> object:
        for argument, value in (*zip(names, given), *named.items()):
            if value is None and argument in required:
                raise RuntimeError(f"{argument} must be a tensor, got None")
        return fake(*given, **named)

    return checked


def define(name: str) -> torch.library.Library:
    """A library of all ops under a name; whoever holds it adds the kernels."""
    library = torch.library.Library(name, "DEF")
    for op, (schema, fake) in OPS.items():
        library.define(op + schema)
        torch.library.register_fake(f"{name}::{op}", _refusing_none(op, schema, fake), lib=library)
    return library


def overloads(name: str) -> dict[str, torch._ops.OpOverload]:
    """The ops of a library by their names, as a backend's namespace has them."""
    library = getattr(torch.ops, name)
    return {op: getattr(library, op).default for op in OPS}
