"""The checks of raw calls of percentile masks and of semantic guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends.raw_checks._refusals import of_a_raw_call, one_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LISTS = ("edit_guidance_scale", "edit_threshold", "weights", "partials", "reverse")


@of_a_raw_call
def percentile_mask(x: Tensor, level: float) -> None:
    """Refuse what the kernels cannot run on."""
    one_of("x", x.dtype, DTYPES)
    _level("level", level)
    if x.dim() != 2 or (x.shape[0] > 0 and x.shape[1] == 0):
        _checks.refuse("x", "have 2 dimensions and values in each row", tuple(x.shape))


@of_a_raw_call
def sega_guidance(
    eps_uncond: Tensor,
    eps_text: Tensor,
    eps_edits: Tensor,
    momentum: Tensor,
    *,
    guidance_scale: float,
    edit_guidance_scale: Sequence[float],
    edit_threshold: Sequence[float],
    weights: Sequence[float],
    partials: Sequence[float],
    all_warm: bool,
    reverse: Sequence[bool],
    edit_momentum_scale: float,
    edit_mom_beta: float,
    user_mask: Tensor | None,
    sum_channels: bool,
) -> None:
    """Refuse what the kernels cannot run on."""
    one_of("eps_uncond", eps_uncond.dtype, DTYPES)
    if eps_uncond.dim() < 2:
        _checks.refuse("eps_uncond", "have at least 2 dimensions", tuple(eps_uncond.shape))
    if eps_edits.dim() == 0:
        _checks.refuse("eps_edits", "have a dimension of concepts", tuple(eps_edits.shape))
    count, one, dtype = eps_edits.shape[0], eps_uncond.shape, eps_uncond.dtype
    _channels("eps_uncond", eps_uncond, one, dtype, eps_uncond)
    _channels("eps_text", eps_text, one, dtype, eps_uncond)
    _channels("eps_edits", eps_edits, (count, *one), dtype, eps_uncond)
    _channels("momentum", momentum, one, torch.float32, eps_uncond)
    if user_mask is not None:
        _channels("user_mask", user_mask, (count, *one), torch.float32, eps_uncond)
    lists = (edit_guidance_scale, edit_threshold, weights, partials, reverse)
    for name, values in zip(_LISTS, lists):
        if len(values) != count:
            _checks.refuse(name, f"have {count} entries", len(values))
    for level in edit_threshold:
        _level("edit_threshold", level)
    rows = count * one[0] * (1 if sum_channels else one[1])
    if rows > 0 and math.prod(one[2:]) == 0:
        _checks.refuse("eps_uncond", "have values in each channel", tuple(one))


def _channels(
    name: str, x: Tensor, shape: Sequence[int], dtype: torch.dtype, eps_uncond: Tensor
) -> None:
    """Require a tensor [..., C, *rest] of a shape and dtype, its axes after C one in memory."""
    if x.shape != shape:
        _checks.refuse(name, f"have shape {tuple(shape)}", tuple(x.shape))
    if x.dtype != dtype:
        _checks.refuse(name, f"be {_checks.name(dtype)}", _checks.name(x.dtype))
    _checks.same_device(name, x, eps_uncond, "eps_uncond")
    if not collapses(x, x.dim() - eps_uncond.dim() + 2):
        _checks.refuse(name, "have trailing axes that collapse", f"strides {x.stride()}")


def collapses(x: Tensor, lead: int) -> bool:
    """Whether the axes of x after the first `lead` are one axis in memory."""
    if x.is_contiguous() or x.numel() == 0:
        return True
    sizes, strides = x.shape, x.stride()
    expected = None
    for axis in range(x.dim() - 1, lead - 1, -1):
        if sizes[axis] == 1:
            continue
        if expected not in (None, strides[axis]):
            return False
        expected = strides[axis] * sizes[axis]
    return True


def _level(name: str, level: float) -> None:
    if not 0 <= level <= 1:
        _checks.refuse(name, "be from 0 to 1", level)
