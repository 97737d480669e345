"""Exact quantiles, percentile masks and one step of semantic guidance."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dense_attn._dtypes import accumulation_dtype


def quantile(values: Tensor, level: float) -> Tensor:
    """Quantiles of rows of any length, linear between two values, NaN where there is one: [..., N]
    -> [...].

    Rank `level*(N - 1)` and interpolation `lower + (upper - lower)*fraction` in float64, rounded
    once.
    """
    ordered, last = values.sort(-1).values, values.shape[-1] - 1  # NaN comes last
    where = "cpu" if values.device.type == "mps" else values.device  # which has no float64
    rank = torch.full((), level, dtype=torch.float64, device=where) * last
    rank = torch.where(values.isnan().any(-1).to(where), last, rank)
    ends = (
        ordered.gather(-1, index.long().to(values.device).unsqueeze(-1))
        for index in (rank.floor(), rank.ceil())
    )
    lower, upper = (end.squeeze(-1).to(where) for end in ends)
    between = lower.double() + (upper.double() - lower.double()) * (rank - rank.floor())
    # Between equals there is nothing, and inf - inf is no number.
    return torch.where(lower == upper, lower, between.to(values.dtype)).to(values.device)


def percentile_mask(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of `dense_attn.percentile_mask` over the last axis: x [R, N] -> x or
    0, threshold [R].
    """
    magnitudes = x.to(accumulation_dtype(x.dtype)).abs()
    threshold = quantile(magnitudes, level)
    return torch.where(magnitudes >= threshold.unsqueeze(-1), x, 0), threshold


def sega_guidance(
    eps_uncond: Tensor,  # [B, C, ...]
    eps_text: Tensor,  # [B, C, ...]
    eps_edits: Tensor,  # [E, B, C, ...]
    momentum: Tensor,  # [B, C, ...]
    *,
    guidance_scale: float,
    edit_guidance_scale: Sequence[float],  # E of each
    edit_threshold: Sequence[float],
    weights: Sequence[float],  # these three as `sega_weights` has them
    partials: Sequence[float],
    all_warm: bool,
    reverse: Sequence[bool],
    edit_momentum_scale: float,
    edit_mom_beta: float,
    user_mask: Tensor | None = None,  # broadcastable to eps_edits
    sum_channels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dense_attn.sega_guidance` in PyTorch: eps, momentum and thresholds [E, B, C|1]."""
    wide = accumulation_dtype(eps_uncond.dtype)
    uncond, text, edits, momentum = (
        x.to(wide) for x in (eps_uncond, eps_text, eps_edits, momentum)
    )
    steered = sega_differences(uncond, edits, edit_guidance_scale, reverse)
    magnitudes = sega_magnitudes(steered, sum_channels)
    rows = magnitudes.unsqueeze(-1).flatten(3)  # [E, B, C or 1, N]
    thresholds = [quantile(concept, level) for concept, level in zip(rows, edit_threshold)]
    thresholds = torch.stack(thresholds) if thresholds else uncond.new_empty(rows.shape[:3])
    kept = magnitudes >= thresholds.reshape(*thresholds.shape, *[1] * (uncond.dim() - 2))
    steered = torch.where(kept, steered, 0)
    if user_mask is not None:
        steered = steered * user_mask
    eps, momentum = sega_combine(
        uncond,
        text,
        steered,
        momentum,
        guidance_scale,
        weights,
        partials,
        all_warm,
        edit_momentum_scale,
        edit_mom_beta,
    )
    # Compiled, torch 2.11 would lose the gradient of what a conversion hands through.
    return eps if eps.dtype == eps_uncond.dtype else eps.to(eps_uncond.dtype), momentum, thresholds


def sega_differences(
    eps_uncond: Tensor,
    eps_edits: Tensor,
    edit_guidance_scale: Sequence[float],
    reverse: Sequence[bool],
) -> Tensor:
    """Each concept's direction: sign * scale * (eps_edit - eps_uncond), [E, B, C, ...]."""
    signed = [
        -scale if negative else scale for scale, negative in zip(edit_guidance_scale, reverse)
    ]
    scales = torch.tensor(signed, dtype=eps_uncond.dtype, device=eps_uncond.device)
    return (eps_edits - eps_uncond) * scales.reshape(-1, *[1] * eps_uncond.dim())


def sega_magnitudes(steered: Tensor, sum_channels: bool) -> Tensor:
    """The numbers that thresholds are of: |d|, or its sum over the channels, in their order."""
    magnitudes = steered.abs()
    if not sum_channels:
        return magnitudes
    total = magnitudes.new_zeros((*magnitudes.shape[:2], 1, *magnitudes.shape[3:]))
    for channel in range(magnitudes.shape[2]):
        total = total + magnitudes[:, :, channel : channel + 1]
    return total


def sega_weights(
    edit_weights: Sequence[float], warm: Sequence[bool], enabled: Sequence[bool]
) -> tuple[list[float], list[float], bool]:
    """Weights of concepts in the momentum and, while others warm up, in eps; whether all are warm.

    A concept that is not enabled, or of a negative weight, has none.
    """
    weights = [max(weight, 0.0) if on else 0.0 for weight, on in zip(edit_weights, enabled)]
    if all(warm):
        return weights, [0.0] * len(weights), True
    ready = [weight if one else 0.0 for weight, one in zip(weights, warm)]
    total = sum(ready)
    return weights, [weight / total if total > 0 else 0.0 for weight in ready], False


def sega_combine(
    eps_uncond: Tensor,  # [B, C, ...]
    eps_text: Tensor,  # [B, C, ...]
    steered: Tensor,  # [E, B, C, ...]: what is left of the differences
    momentum: Tensor,  # [B, C, ...]
    guidance_scale: float,
    weights: Sequence[float],
    partials: Sequence[float],
    all_warm: bool,
    edit_momentum_scale: float,
    edit_mom_beta: float,
) -> tuple[Tensor, Tensor]:
    """(eps, momentum) of one step once the thresholds have been applied."""
    eps = eps_uncond + guidance_scale * (eps_text - eps_uncond)
    steer = edit_momentum_scale * momentum
    for direction, weight, partial in zip(steered, weights, partials):
        if weight:
            steer = steer + weight * direction
        if partial:
            eps = eps + partial * direction
    if all_warm:
        eps = eps + steer
    return eps, edit_mom_beta * momentum + (1 - edit_mom_beta) * steer
