"""Inputs of semantic guidance: estimates that go together, in the shapes and dtypes of kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks, _memory, reference

Check = Callable[[str, object], object]


def rows(x: Tensor, lead: int) -> Tensor:
    """x with all axes after the first `lead` made one: a view where they collapse."""
    if x.dim() > lead + 1:
        return x.flatten(lead)
    return x.reshape(*x.shape[:lead], prod(x.shape[lead:]))


def estimates(eps_uncond: Tensor, eps_text: Tensor, eps_edits: Tensor | Sequence[Tensor]) -> Tensor:
    """eps_edits as one tensor [E, B, C, ...], once all three go together."""
    shape = _checks.floats("eps_uncond", eps_uncond).shape
    if len(shape) < 2 or 0 in shape[2:]:
        rule = "have shape [batch, channels, ...] with at least one value in a channel"
        _checks.refuse("eps_uncond", rule, tuple(shape))
    _checks.like("eps_text", eps_text, eps_uncond, "eps_uncond")
    if isinstance(eps_edits, (list, tuple)):
        for edit in eps_edits:
            _checks.like("eps_edits", edit, eps_uncond, "eps_uncond")
        return _stacked(eps_edits, eps_uncond)
    if _checks.tensor("eps_edits", eps_edits).dim() == 0 or eps_edits.shape[1:] != shape:
        rule = f"have shape [concepts, *eps_uncond.shape = {tuple(shape)}]"
        _checks.refuse("eps_edits", rule, tuple(eps_edits.shape))
    _checks.same_dtype("eps_edits", eps_edits, eps_uncond, "eps_uncond")
    _checks.same_device("eps_edits", eps_edits, eps_uncond, "eps_uncond")
    return eps_edits


def _stacked(edits: Sequence[Tensor], like: Tensor) -> Tensor:
    try:
        return torch.stack(tuple(edits)) if edits else like.new_empty((0, *like.shape))
    except RuntimeError as error:
        given = {f"{len(edits)} eps_edits, each": like}
        _memory.explain(error, "sega_guidance", len(edits) * like.nbytes, **given)
        raise


def wide_momentum(momentum: Tensor | None, eps: Tensor) -> Tensor:
    """momentum in the dtype that kernels accumulate in."""
    if momentum is None:
        return eps.new_zeros((), dtype=reference.accumulation_dtype(eps.dtype)).expand(eps.shape)
    wide = _wide("momentum", momentum, eps)
    if momentum.shape != eps.shape:
        rule = f"have eps_uncond's shape {tuple(eps.shape)}"
        _checks.refuse("momentum", rule, tuple(momentum.shape))
    return wide


def wide_mask(user_mask: Tensor | None, eps: Tensor, shape: torch.Size) -> Tensor | None:
    """user_mask in the dtype that kernels accumulate in, expanded to [E, B, C, ...]."""
    if user_mask is None:
        return None
    wide = _wide("user_mask", user_mask, eps, torch.bool)
    padded = (1,) * (len(shape) - wide.dim()) + tuple(wide.shape)
    if len(padded) > len(shape) or any(n not in (1, size) for n, size in zip(padded, shape)):
        rule = f"broadcast to eps_edits' shape {tuple(shape)}"
        _checks.refuse("user_mask", rule, tuple(wide.shape))
    return wide if wide.shape == shape else wide.expand(shape)


def _wide(argument: str, value: Tensor, eps: Tensor, *others: torch.dtype) -> Tensor:
    """A tensor of eps' dtype, or of the one that kernels accumulate in, in the latter."""
    wide = reference.accumulation_dtype(eps.dtype)
    dtype = _checks.tensor(argument, value).dtype
    if dtype != wide and dtype != eps.dtype and dtype not in others:
        allowed = dict.fromkeys((wide, eps.dtype, *others))
        rule = f"be {' or '.join(map(_checks.name, allowed))}"
        _checks.refuse(argument, rule, _checks.name(dtype), TypeError)
    _checks.same_device(argument, value, eps, "eps_uncond")
    return value if dtype == wide else value.to(wide)


def number_of(dtype: torch.dtype) -> Check:
    """The check of a number that is finite in a dtype."""

    def check(argument: str, value: object) -> float:
        return _checks.number(argument, value, dtype)

    return check


def each(argument: str, value: object, check: Check, count: int) -> list:
    """One value for each of the concepts, from one or a sequence of them, each checked."""
    return spread(argument, values(argument, value, check), count)


def values(argument: str, value: object, check: Check) -> object:
    """One value or a tuple of them, one for each concept, each checked."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple([check(argument, one) for one in value])
    return check(argument, value)


def spread(argument: str, values: object, count: int) -> list:
    """One value for each of the concepts."""
    if not isinstance(values, tuple):
        return [values] * count
    if len(values) != count:
        rule = f"be one value or {count}, one for each concept"
        _checks.refuse(argument, rule, f"{len(values)} values")
    return list(values)
