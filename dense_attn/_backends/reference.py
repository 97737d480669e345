"""The reference as a backend: the maths under the names and signatures of the raw ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from dense_attn import reference
from dense_attn._dtypes import accumulation_dtype
from dense_attn.reference import (  # noqa: F401  under their own names
    ddim_step,
    edict_mix,
    edict_unmix,
    exact_couple,
    exact_leapfrog,
    exact_mix,
    exact_unmix,
    leapfrog_step,
)

LOAD_ERROR = None
AUTOGRAD = True  # torch differentiates it
NO_KERNELS = {"layout_attention_bwd", "tile_lists"}


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
) -> tuple[Tensor, Tensor, None]:
    """(out, lse) of `reference.layout_attention`, lse in any case, and no numbers for a backward
    pass.
    """
    c = every_strength if strength is None else strength
    k_mask = None
    if seqlens_k is not None:
        keys = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)
        k_mask = keys < seqlens_k[:, None]
    out, lse = reference.layout_attention(
        q, k, v, q_regions, k_regions, c, modulation=modulation, scale=scale, k_mask=k_mask
    )
    return out, lse.to(accumulation_dtype(q.dtype)), None


def attention_bytes(q: Tensor, k: Tensor) -> int:
    """The bytes that a call of layout attention takes at least: all of its scores."""
    return q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.element_size()


def tiled(q: Tensor, k: Tensor) -> bool:
    """False: calls take no tile lists."""
    return False


def _with_gradients_of_kernels(op: Callable) -> Callable:
    """An op whose thresholds, its last result, have no gradient, and whose other results have one
    in every tensor: 0 where a weight is.
    """

    @wraps(op)
    def connected(*tensors: object, **options: object) -> tuple[Tensor, ...]:
        *results, thresholds = op(*tensors, **options)
        given = [x for x in (*tensors, *options.values()) if isinstance(x, Tensor)]
        for x in given if torch.is_grad_enabled() else ():
            if x.requires_grad:
                never = torch.zeros((), dtype=torch.bool, device=x.device)
                results = [torch.where(never, x.sum().to(y.dtype), y) for y in results]
        return *results, thresholds.detach()

    return connected


percentile_mask = _with_gradients_of_kernels(reference.percentile_mask)
sega_guidance = _with_gradients_of_kernels(reference.sega_guidance)
