"""Tensors as layout attention's kernels take them: a pointer and strides."""

from __future__ import annotations

from functools import lru_cache

import triton.language as tl
from torch import Tensor

from dense_attn.triton_kernels import configs

_GRAIN, _ONE = tl.constexpr(configs.GRAIN), tl.constexpr(1)


def rows_of(x: Tensor) -> tuple[Tensor, int, int, int, tl.constexpr]:
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


def tokens_of(x: Tensor | None) -> tuple[Tensor, int, int] | None:
    """[tokens] or [B|1, tokens, ...] as kernels take it: the tensor and two strides, 0 where
    samples share one row.
    """
    if x is None:
        return None
    if x.dim() == 1:
        return x, 0, x.stride(0)
    return x, x.stride(0) if x.shape[0] > 1 else 0, x.stride(1)


def counted(seqlens_k: Tensor | None) -> dict[str, tuple[Tensor, int]]:
    """How many keys of each sample are there, int32 [B], as kernels take it beside the others."""
    return {} if seqlens_k is None else {"seqlens": (seqlens_k, seqlens_k.stride(0))}


def numbers_of(
    x: Tensor | None, every: float
) -> tuple[Tensor | None, float, int, int, tl.constexpr]:
    """Numbers [B, H, tokens] as kernels take them; without a tensor, the one that all rows have."""
    return (None, every, 0, 0, _ONE) if x is None else rows_of(x)
