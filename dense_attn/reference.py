"""The maths in PyTorch: what every kernel of the library computes, without tiling or options."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# largest grid coordinate: float64 holds its latent, and the latent gives it back, exactly
GRID_LIMIT = 2.0**50


class OffGridError(RuntimeError):
    """A step that leaves the grid of exact chains; `steps` is a coordinate that it would reach."""

    @property
    def steps(self) -> float:
        """The coordinate, of a grid that ends at 2^50."""
        return self.args[0]

    def __str__(self) -> str:
        rule = "be finite and keep the latents within the grid of 2^50 steps"
        return f"eps must {rule}, got {self.steps:g} steps"


def layout_attention(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    q_regions: Tensor,  # int32 [M] or [B|1, M]
    k_regions: Tensor,  # int32 [N] or [B|1, N]
    strength: Tensor | float = 1.0,  # broadcastable to [B, H, M]
    *,
    modulation: str = "range",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of `dense_attn.layout_attention`: returns (out, lse)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[-2] == 0:
        lse = q.sum(-1) * 0 - torch.inf  # [B, H, M]
        return q * 0, lse
    scores = (q @ k.transpose(-1, -2)) * scale  # [B, H, M, N]
    matched = ((q_regions.unsqueeze(-1) & k_regions.unsqueeze(-2)) != 0).unsqueeze(-3)
    modulated = modulate(scores, matched, strength, modulation)

    lse = torch.logsumexp(modulated, dim=-1, keepdim=True)  # [B, H, M, 1]
    shift = lse.masked_fill(lse == -torch.inf, 0.0)  # a row without admissible keys has no weights
    return torch.exp(modulated - shift) @ v, lse.squeeze(-1)


def modulate(scores: Tensor, matched: Tensor, strength: Tensor | float, modulation: str) -> Tensor:
    """Modulated scores s' of scores [B, H, M, N] under matched [B|1, 1, M|M, N]."""
    if modulation == "mask":
        return scores.masked_fill(~matched, -torch.inf)
    c = torch.as_tensor(strength, dtype=scores.dtype, device=scores.device)
    c = c.expand(scores.shape[:-1]).unsqueeze(-1)  # [B, H, M, 1]
    if modulation == "bias":
        return scores + c * matched
    row_max = scores.gather(
        -1, scores.argmax(-1, keepdim=True)
    )  # a tie's gradient goes to its first key
    if modulation == "max":
        return scores + c * matched * row_max
    row_min = scores.gather(-1, scores.argmin(-1, keepdim=True))
    return (1 - c) * scores + c * torch.where(matched, row_max, row_min)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What kernels compute with: float64 for float64, float32 for the rest."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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
    """PyTorch implementation of `dense_attn.sega_guidance`: eps, momentum, thresholds [E, B, C|1]."""
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
    """What each concept asks for: sign * scale * (eps_edit - eps_uncond), [E, B, C, ...]."""
    signed = [
        -scale if negative else scale for scale, negative in zip(edit_guidance_scale, reverse)
    ]
    scales = torch.tensor(signed, dtype=eps_uncond.dtype, device=eps_uncond.device)
    return (eps_edits - eps_uncond) * scales.reshape(-1, *[1] * eps_uncond.dim())


def sega_magnitudes(steered: Tensor, sum_channels: bool) -> Tensor:
    """What is compared with the threshold: |d|, or its sum over the channels, added up in their
    order.
    """
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


def ddim_step(
    x: Tensor, eps: Tensor, eps_uncond: Tensor | None, a: float, b: float, guidance_scale: float
) -> Tensor:
    """a*x + b*(eps_uncond + guidance_scale*(eps - eps_uncond)): a DDIM step, its inverse, one EDICT
    coupling.
    """
    wide = accumulation_dtype(x.dtype)
    direction = eps.to(wide)
    if eps_uncond is not None:
        direction = eps_uncond.to(wide) + guidance_scale * (direction - eps_uncond.to(wide))
    return (a * x.to(wide) + b * direction).to(x.dtype)


def leapfrog_step(
    far: Tensor, near: Tensor, eps: Tensor, c_far: float, c_near: float, c_eps: float
) -> Tensor:
    """c_far*far + c_near*near + c_eps*eps: what BDIA and O-BELM are made of, either way."""
    wide = accumulation_dtype(far.dtype)
    return (c_far * far.to(wide) + c_near * near.to(wide) + c_eps * eps.to(wide)).to(far.dtype)


def edict_mix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    """a*x + b*eps in x (or y), unless eps is None; then x <- p x + (1-p) y, y <- (1-p) x + p y with
    the new x.
    """
    new_x, new_y = _coupled(x, y, eps, a, b, couple_x)
    new_x = mix * new_x + (1 - mix) * new_y
    new_y = (1 - mix) * new_x + mix * new_y
    return new_x.to(x.dtype), new_y.to(y.dtype)


def edict_unmix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    """a*x + b*eps in x (or y), unless eps is None; then the inverse of the mix."""
    new_x, new_y = _coupled(x, y, eps, a, b, couple_x)
    new_y = (new_y - (1 - mix) * new_x) / mix
    new_x = (new_x - (1 - mix) * new_y) / mix
    return new_x.to(x.dtype), new_y.to(y.dtype)


def _coupled(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    wide = accumulation_dtype(x.dtype)
    x, y = x.to(wide), y.to(wide)
    if eps is None:
        return x, y
    change = b * eps.to(wide)
    return (a * x + change, y) if couple_x else (x, a * y + change)


def exact_couple(
    z: Tensor, eps: Tensor, step: float, to_latent: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """z + round(step*eps) on the int64 grid, and its latent to_latent*z in a dtype: undone by
    -step.
    """
    z = z + _rounded(step * eps.double())
    return _checked(z), (to_latent * z.double()).to(dtype)


def exact_leapfrog(
    far: Tensor,
    near: Tensor,
    eps: Tensor,
    c_near: float,
    c_eps: float,
    to_latent: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """far + round(c_near*near + c_eps*eps) on the int64 grid, and its latent: undone by -c_near,
    -c_eps.
    """
    z = far + _rounded(c_near * near.double() + c_eps * eps.double())
    return _checked(z), (to_latent * z.double()).to(dtype)


def exact_mix(
    x: Tensor, y: Tensor, eps: Tensor | None, step: float, mix: float, couple_x: bool,
    to_latent: float, latent_x: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A coupling (unless eps is None), then the mix divided by p as two unit shears; the latent of
    x or y.
    """
    x, y = _coupled_exactly(x, y, eps, step, couple_x)
    x = _checked(x + _rounded((1 - mix) / mix * y.double()))
    y = _checked(y + _rounded((1 - mix) * x.double()))
    return x, y, (to_latent * (x if latent_x else y).double()).to(dtype)


def exact_unmix(
    x: Tensor, y: Tensor, eps: Tensor | None, step: float, mix: float, couple_x: bool,
    to_latent: float, latent_x: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """A coupling (unless eps is None), then the inverse shears of `exact_mix`; the latent of x or
    y.
    """
    x, y = _coupled_exactly(x, y, eps, step, couple_x)
    y = _checked(y - _rounded((1 - mix) * x.double()))
    x = _checked(x - _rounded((1 - mix) / mix * y.double()))
    return x, y, (to_latent * (x if latent_x else y).double()).to(dtype)


def _coupled_exactly(
    x: Tensor, y: Tensor, eps: Tensor | None, step: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    if eps is None:
        return x, y
    change = _rounded(step * eps.double())
    return (_checked(x + change), y) if couple_x else (x, _checked(y + change))


def _rounded(change: Tensor) -> Tensor:
    """Half to even; refuses what int64 could not hold."""
    inside = change.abs() <= GRID_LIMIT
    if not inside.all():
        raise OffGridError(change[~inside][0].item())
    return change.round().long()


def _checked(z: Tensor) -> Tensor:
    inside = z.double().abs() <= GRID_LIMIT  # torch would compare int64 with a number in float32
    if not inside.all():
        raise OffGridError(z[~inside][0].item())
    return z
