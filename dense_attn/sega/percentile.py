"""The percentile mask that semantic guidance rests on: checks, autograd and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks, _memory
from dense_attn._backends import dispatch, plans, table

LAST_TWO = (-2, -1)


def percentile_mask(
    x: Tensor, level: float, *, dim: int | Sequence[int] = LAST_TWO, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The entries of x of largest magnitude, the others set to 0, and the threshold between them.

    `threshold = quantile(|x|, level)` over the axes `dim`, for rows of any length: with the rank
    `level*(n - 1)`, its fraction f and the two order statistics beside it,
    `lower + (upper - lower)*f` in float64, rounded once, the same bits on every backend;
    `masked = x where |x| >= threshold, else 0`.

    Args:
        x: of any shape and strides; float32, bfloat16, float16 or float64.
        level: from 0 (keeps every entry) to 1 (keeps the largest alone, and its equals).
        dim: the axis or axes that make one row; x is copied only where no view has those rows.
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; a named one runs or
            raises.

    Returns:
        `(masked, threshold)`: x's shape and dtype; x's shape without `dim`, float32 (float64 for
        float64). A row with a NaN has the threshold NaN and keeps nothing. Differentiable in x
        through the kept entries, any number of times; the threshold counts as a constant.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.
        RuntimeError: the named backend cannot run this call, with every reason.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023.

    Example:
        >>> import torch, dense_attn
        >>> x = torch.tensor([[1.0, -4.0], [3.0, -2.0]])
        >>> dense_attn.percentile_mask(x, 0.5)
        (tensor([[ 0., -4.],
                [ 3.,  0.]]), tensor(2.5000))
    """
    form = _form(x, dim, backend)
    plan = _plans.get(form) or _planned(form, x, dim, backend)
    level = _checks.fraction("level", level)
    moved = x if plan.order is None else x.permute(plan.order)
    try:
        rows = moved if plan.rows else moved.reshape(-1, plan.length)  # [R, N]
        masked, threshold = dispatch.run(_PercentileMask, rows, level, plan.backend)
    except RuntimeError as error:
        _memory.explain(error, "percentile_mask", x.numel() * x.element_size(), x=x)
        raise
    if plan.rows:
        return masked, threshold
    masked = masked.reshape_as(moved)
    if plan.order is not None:
        masked = masked.permute(sorted(range(x.dim()), key=plan.order.__getitem__))
    return masked, torch.reshape(threshold, moved.shape[: plan.count])


class _Plan(NamedTuple):
    """The consequences of a call's form."""

    order: list[int] | None  # the axes with those of a row last, None where they are
    count: int  # of the others
    length: int  # of a row
    rows: bool  # whether x is what the raw op takes
    backend: str


_plans: plans.Plans[_Plan] = plans.Plans()


def _form(x: Tensor, dim: int | Sequence[int], backend: str) -> plans.Form | None:
    """The form of a call, which has all that the checks look at but for numbers; None in a graph,
    and where the axes are neither one nor the default.
    """
    if torch.compiler.is_compiling() or not (dim is LAST_TWO or dim.__class__ is int):
        return None
    try:
        return plans.look(x), x.stride(), dim, backend
    except (AttributeError, RuntimeError):
        return None


def _planned(form: plans.Form | None, x: Tensor, dim: int | Sequence[int], backend: str) -> _Plan:
    """The plan of a call that the checks let through, which is kept for those of its form."""
    _checks.floats("x", x)
    reduced = _axes("dim", dim, x)
    count = x.dim() - len(reduced)
    order = None if reduced[0] == count else _order(x, reduced)
    length = prod([x.shape[axis] for axis in reduced])  # compilers take no generator here
    if length == 0:
        _checks.refuse("x", "have at least one entry along dim", tuple(x.shape))
    rows = order is None and count == len(reduced) == 1
    name = table.resolve(backend, "percentile_mask", x)
    return _plans.keep(form, _Plan(order, count, length, rows, name), x)


def _axes(argument: str, value: object, x: Tensor) -> list[int]:
    """The axes of x that an int or a sequence of ints names, in order."""
    total = x.dim()
    if type(value) is tuple and value == LAST_TWO and total >= 2:  # the default, at once
        return [total - 2, total - 1]
    axes = value if isinstance(value, (list, tuple)) else (value,)
    for axis in axes or (None,):
        if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
            _checks.refuse(argument, "be an int or a sequence of ints", repr(value), TypeError)
    wrapped = sorted({int(axis) + (total if axis < 0 else 0) for axis in axes})
    if wrapped[0] < 0 or wrapped[-1] >= total or len(wrapped) < len(axes):
        _checks.refuse(argument, f"name distinct axes of x's {total}", repr(value))
    return wrapped


def _order(x: Tensor, last: list[int]) -> list[int]:
    """The axes of x with some of them last."""
    return [axis for axis in range(x.dim()) if axis not in last] + last


class _PercentileMask(torch.autograd.Function):
    generate_vmap_rule = True
    num_tensors = 1

    @staticmethod
    def forward(x, level, backend):  # noqa: ANN001, ANN205
        return table.NAMESPACES[backend].percentile_mask(x, level)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx, grad, _):  # noqa: ANN001, ANN205
        x, threshold = ctx.saved_tensors
        kept = x.to(threshold.dtype).abs() >= threshold.unsqueeze(-1)
        return torch.where(kept, grad, 0), None, None
