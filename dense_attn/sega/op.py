"""Semantic guidance and the percentile mask it rests on: the public ops, their checks, their
autograd and dispatch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import prod

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks, _memory, reference
from dense_attn._backends import dispatch, table


def percentile_mask(
    x: Tensor, level: float, *, dim: int | Sequence[int] = (-2, -1), backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The entries of x that are largest in magnitude, the others set to 0, and the threshold
    between them.

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
    _checks.floats("x", x)
    level = _checks.fraction("level", level)
    reduced = _axes("dim", dim, x)
    order = [axis for axis in range(x.dim()) if axis not in reduced] + reduced
    moved = x.permute(order)
    lead = moved.shape[: x.dim() - len(reduced)]
    if 0 in moved.shape[len(lead) :]:
        _checks.refuse("x", "have at least one entry along dim", tuple(x.shape))
    try:
        rows = moved.reshape(prod(lead), prod(moved.shape[len(lead) :]))  # [R, N]
        name = table.resolve(backend, "percentile_mask", x)
        masked, threshold = dispatch.run(_PercentileMask, rows, level, name)
    except RuntimeError as error:
        _memory.explain(error, "percentile_mask", x.numel() * x.element_size(), x=x)
        raise
    back = sorted(range(x.dim()), key=order.__getitem__)
    return masked.reshape(moved.shape).permute(back), threshold.reshape(lead)


def sega_guidance(
    eps_uncond: Tensor,  # [B, C, ...]
    eps_text: Tensor,  # [B, C, ...]
    eps_edits: Tensor | Sequence[Tensor],  # [E, B, C, ...], or E of [B, C, ...]
    momentum: Tensor | None,  # [B, C, ...]
    *,
    guidance_scale: float,
    edit_guidance_scale: float
    | Sequence[float],  # each: one for all, or one of each of the E concepts
    edit_threshold: float | Sequence[float],
    edit_weights: float | Sequence[float],
    warm: bool | Sequence[bool],
    enabled: bool | Sequence[bool],
    reverse: bool | Sequence[bool],
    edit_momentum_scale: float,
    edit_mom_beta: float,
    user_mask: Tensor | None = None,  # broadcastable to [E, B, C, ...]
    sum_channels: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of semantic guidance: the noise estimate pushed towards, or away from, any number of
    edit concepts.

    For each concept e: `d = ±edit_guidance_scale*(eps_edit - eps_uncond)`, minus where `reverse`;
    of each sample and channel what is below `quantile(|d|, edit_threshold)` is set to 0. With w the
    weights, 0 where negative or not `enabled`,

    - `steer = sum_e w_e*d_e + edit_momentum_scale*momentum`,
    - `momentum <- edit_mom_beta*momentum + (1 - edit_mom_beta)*steer`,
    - `eps = eps_uncond + guidance_scale*(eps_text - eps_uncond) + addition`, where the addition is
      `steer` once every concept is `warm`, `sum w_e*d_e / sum w_e` over the warm ones while only
      some are (0 where no weight is left), and 0 while none is.

    With `edit_threshold = 0` every entry is kept: composable diffusion, and weighted negative
    prompting with `reverse`.

    Args:
        eps_uncond, eps_text: `[B, C, ...]` of one shape and dtype: float32, bfloat16, float16 or
            float64; any strides, copied only where the axes after C do not collapse to one
            (contiguous and channels_last ones do).
        eps_edits: `[E, B, C, ...]`, taken as it is, or a sequence of E tensors `[B, C, ...]`, which
            is stacked.
        momentum: what the step before returned; None is 0. In eps' dtype or the dtype it is
            returned in.
        guidance_scale, edit_momentum_scale, edit_mom_beta: numbers.
        edit_guidance_scale, edit_threshold (0 to 1), edit_weights, warm, enabled, reverse: one
        value, or E.
        user_mask: bool, or in a dtype that momentum may have; multiplies d after the thresholds
            have been found without it (LEDITS++'s first mask). Copied to `[E, B, C, ...]` where its
            expanded last axes do not collapse.
        sum_channels: thresholds on the sum of |d| over the channels, one for each sample
            (LEDITS++'s second mask).
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; a named one runs or
            raises.

    Returns:
        `(eps, momentum)`: contiguous, eps in its own dtype, momentum float32 (float64 for float64).
        Differentiable in every tensor through the kept entries, any number of times; thresholds
        count as constants. A NaN in eps_edits or eps_uncond leaves nothing kept of its row.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.
        RuntimeError: the named backend cannot run this call, with every reason.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023; Brack et al., LEDITS++: Limitless Image Editing using Text-to-Image Models, CVPR 2024.

    Example:
        >>> import torch, dense_attn
        >>> uncond, text, smile, hat = torch.randn(4, 1, 4, 64, 64)
        >>> eps, momentum = dense_attn.sega_guidance(uncond, text, [smile, hat], None, guidance_scale=7.5,
        ...     edit_guidance_scale=5.0, edit_threshold=[0.9, 0.95], edit_weights=1.0, warm=True, enabled=True,
        ...     reverse=[False, True], edit_momentum_scale=0.1, edit_mom_beta=0.4)
        >>> eps.shape
        torch.Size([1, 4, 64, 64])
    """
    edits = check_eps(eps_uncond, eps_text, eps_edits)
    count, number = (
        edits.shape[0],
        partial(_checks.number, dtype=reference.accumulation_dtype(eps_uncond.dtype)),
    )
    each = {  # by the names of the kernels' arguments
        "edit_guidance_scale": (edit_guidance_scale, number),
        "edit_threshold": (edit_threshold, _checks.fraction),
        "edit_weights": (edit_weights, number),
        "warm": (warm, _checks.flag),
        "enabled": (enabled, _checks.flag),
        "reverse": (reverse, _checks.flag),
    }
    each = {
        name: spread(name, values(name, value, check), count)
        for name, (value, check) in each.items()
    }
    options = (
        number("guidance_scale", guidance_scale),
        *each.values(),
        number("edit_momentum_scale", edit_momentum_scale),
        number("edit_mom_beta", edit_mom_beta),
        _checks.flag("sum_channels", sum_channels),
    )
    try:
        user_mask = _wide_mask(user_mask, eps_uncond, edits.shape)
        tensors = [
            _rows(eps_uncond, 2),  # [B, C, N]
            _rows(eps_text, 2),
            _rows(edits, 3),
            _rows(_wide_momentum(momentum, eps_uncond), 2),
            None if user_mask is None else _rows(user_mask, 3),
        ]
        name = table.resolve(backend, "sega_guidance", eps_uncond)
        eps, momentum, _ = dispatch.run(_SegaGuidance, *tensors, *options, name)
    except RuntimeError as error:
        _memory.explain(
            error, "sega_guidance", eps_uncond.nbytes, eps_uncond=eps_uncond, eps_edits=edits
        )
        raise
    return eps.reshape(eps_uncond.shape), momentum.reshape(eps_uncond.shape)


class _PercentileMask(torch.autograd.Function):
    generate_vmap_rule = True

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


class _SegaGuidance(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # noqa: ANN205
        eps_uncond, eps_text, eps_edits, momentum, user_mask,  # noqa: ANN001
        guidance_scale, edit_guidance_scale, edit_threshold, edit_weights, warm, enabled, reverse,  # noqa: ANN001
        edit_momentum_scale, edit_mom_beta, sum_channels, backend,  # noqa: ANN001
    ):  # fmt: skip
        return table.NAMESPACES[backend].sega_guidance(
            eps_uncond, eps_text, eps_edits, momentum,
            guidance_scale=guidance_scale, edit_guidance_scale=edit_guidance_scale, edit_threshold=edit_threshold,
            edit_weights=edit_weights, warm=warm, enabled=enabled, reverse=reverse,
            edit_momentum_scale=edit_momentum_scale, edit_mom_beta=edit_mom_beta,
            user_mask=user_mask, sum_channels=sum_channels,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        eps_uncond, _, eps_edits, _, user_mask, *ctx.options, _ = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(eps_uncond, eps_edits, user_mask, output[2])

    @staticmethod
    def backward(ctx, grad_eps, grad_momentum, _):  # noqa: ANN001, ANN205
        """The transpose of what is linear in all but user_mask once the kept entries are given."""
        eps_uncond, eps_edits, user_mask, thresholds = ctx.saved_tensors
        (
            guidance_scale,
            scales,
            _,
            weights,
            warm,
            enabled,
            reverse,
            momentum_scale,
            beta,
            sum_channels,
        ) = ctx.options
        steered = reference.sega_differences(
            eps_uncond.to(thresholds.dtype), eps_edits.to(thresholds.dtype), scales, reverse
        )
        kept = reference.sega_magnitudes(steered, sum_channels) >= thresholds.unsqueeze(-1)
        flow = grad_eps.to(thresholds.dtype)
        grad_steer = (1 - beta) * grad_momentum + (flow if all(warm) else 0)
        rates = zip(*reference.sega_weights(weights, warm, enabled))
        grads = [weight * grad_steer + partial * flow for weight, partial in rates]
        grads = (
            torch.where(kept, torch.stack(grads), 0) if grads else torch.zeros_like(steered)
        )  # [E, B, C, N]
        grad_mask = grads * torch.where(kept, steered, 0) if ctx.needs_input_grad[4] else None
        if user_mask is not None:
            grads = grads * user_mask
        grad_edits = reference.sega_differences(torch.zeros_like(flow), grads, scales, reverse)
        grad_uncond = (1 - guidance_scale) * flow - grad_edits.sum(0)
        grads = (x.to(eps_uncond.dtype) for x in (grad_uncond, guidance_scale * flow, grad_edits))
        return *grads, beta * grad_momentum + momentum_scale * grad_steer, grad_mask, *[None] * 11


def _rows(x: Tensor, lead: int) -> Tensor:
    """x with all axes after the first `lead` made one: a view where they collapse."""
    return x.reshape(*x.shape[:lead], prod(x.shape[lead:]))


def _axes(argument: str, value: object, x: Tensor) -> list[int]:
    """The axes of x that an int or a sequence of ints names, in order."""
    axes = list(value) if isinstance(value, (list, tuple)) else [value]
    if not axes or any(
        isinstance(axis, bool) or not isinstance(axis, (int, np.integer)) for axis in axes
    ):
        _checks.refuse(argument, "be an int or a sequence of ints", repr(value), TypeError)
    wrapped = sorted({int(axis) % max(x.dim(), 1) for axis in axes})
    if any(not -x.dim() <= axis < x.dim() for axis in axes) or len(wrapped) < len(axes):
        _checks.refuse(argument, f"name distinct axes of x's {x.dim()}", repr(value))
    return wrapped


def check_eps(eps_uncond: Tensor, eps_text: Tensor, eps_edits: Tensor | Sequence[Tensor]) -> Tensor:
    """eps_edits as one tensor [E, B, C, ...], once all three go together."""
    if _checks.floats("eps_uncond", eps_uncond).dim() < 2 or 0 in eps_uncond.shape[2:]:
        rule = "have shape [batch, channels, ...] with at least one value in a channel"
        _checks.refuse("eps_uncond", rule, tuple(eps_uncond.shape))
    _checks.like("eps_text", eps_text, eps_uncond, "eps_uncond")
    if isinstance(eps_edits, (list, tuple)):
        for edit in eps_edits:
            _checks.like("eps_edits", edit, eps_uncond, "eps_uncond")
        return _stacked(eps_edits, eps_uncond)
    shape = tuple(eps_uncond.shape)
    if (
        _checks.tensor("eps_edits", eps_edits).dim() != len(shape) + 1
        or tuple(eps_edits.shape[1:]) != shape
    ):
        _checks.refuse(
            "eps_edits",
            f"have shape [concepts, *eps_uncond.shape = {shape}]",
            tuple(eps_edits.shape),
        )
    _checks.like("eps_edits", eps_edits, eps_uncond.expand(eps_edits.shape), "eps_uncond")
    return eps_edits


def _stacked(edits: Sequence[Tensor], like: Tensor) -> Tensor:
    try:
        return torch.stack(tuple(edits)) if edits else like.new_empty((0, *like.shape))
    except RuntimeError as error:
        _memory.explain(
            error,
            "sega_guidance",
            len(edits) * like.nbytes,
            **{f"{len(edits)} eps_edits, each": like},
        )
        raise


def _wide_momentum(momentum: Tensor | None, eps: Tensor) -> Tensor:
    """momentum in the dtype that kernels accumulate in."""
    if momentum is None:
        return eps.new_zeros((), dtype=reference.accumulation_dtype(eps.dtype)).expand(eps.shape)
    wide = _wide("momentum", momentum, eps)
    if momentum.shape != eps.shape:
        _checks.refuse(
            "momentum", f"have eps_uncond's shape {tuple(eps.shape)}", tuple(momentum.shape)
        )
    return wide


def _wide_mask(user_mask: Tensor | None, eps: Tensor, shape: torch.Size) -> Tensor | None:
    """user_mask in the dtype that kernels accumulate in, expanded to [E, B, C, ...]."""
    if user_mask is None:
        return None
    wide = _wide("user_mask", user_mask, eps, torch.bool)
    padded = (1,) * (len(shape) - wide.dim()) + tuple(wide.shape)
    if len(padded) > len(shape) or any(n not in (1, size) for n, size in zip(padded, shape)):
        _checks.refuse(
            "user_mask", f"broadcast to eps_edits' shape {tuple(shape)}", tuple(wide.shape)
        )
    return wide.expand(shape)


def _wide(argument: str, value: Tensor, eps: Tensor, *others: torch.dtype) -> Tensor:
    """A tensor of eps' dtype, or of the one that kernels accumulate in, in the latter."""
    wide = reference.accumulation_dtype(eps.dtype)
    allowed = dict.fromkeys((wide, eps.dtype, *others))
    if _checks.tensor(argument, value).dtype not in allowed:
        _checks.refuse(
            argument,
            f"be {' or '.join(map(_checks.name, allowed))}",
            _checks.name(value.dtype),
            TypeError,
        )
    _checks.same_device(argument, value, eps, "eps_uncond")
    return value.to(wide)


def values(argument: str, value: object, check: Callable) -> object:
    """One value or a tuple of them, one per concept, each checked."""
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(check(argument, one) for one in value)
    return check(argument, value)


def spread(argument: str, values: object, count: int) -> list:
    """One value for each of the concepts."""
    if not isinstance(values, tuple):
        return [values] * count
    if len(values) != count:
        _checks.refuse(
            argument, f"be one value or {count}, one for each concept", f"{len(values)} values"
        )
    return list(values)
