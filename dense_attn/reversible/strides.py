"""Memory order: the strides that the latents of a run share, since kernels take no others."""

from __future__ import annotations

import torch
from torch import Tensor


def laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The tensor in memory of these strides: itself, or a copy."""
    if value.stride() == strides:
        return value
    return value.new_empty_strided(value.shape, strides).copy_(value)


def dense_strides(x: Tensor) -> tuple[int, ...]:
    """x's own strides where it fills one block of memory, those of its copy otherwise."""
    if x.is_contiguous():
        return x.stride()
    return torch.empty_like(x, device="meta").stride()


def contiguous_strides(x: Tensor) -> tuple[int, ...]:
    """The strides of a contiguous tensor of x's shape, axes of one included."""
    return torch.empty(x.shape, dtype=x.dtype, device="meta").stride()
