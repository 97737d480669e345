"""Reversible steps, in floats and on the integer grid."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_attn._dtypes import accumulation_dtype

# The largest grid coordinate: float64 holds its latent, and the latent gives it back, exactly.
GRID_LIMIT = 2.0**50


class OffGridError(RuntimeError):
    """The error of a latent that leaves the grid of an exact chain: larger than 2^50 steps, or NaN.

    Args:
        message: a sentence.
        coordinate: the number in steps of the grid, where it is known.
        step: the chain's step, counted from 0 at the noise; None outside of a chain.

    Source: the integer grid of `ReversibleSampler(exact=True)`.

    Example:
        >>> import torch, dense_attn
        >>> chain = dense_attn.ReversibleSampler(torch.linspace(0.999, 0.01, 1000), (900, 500, 100))
        >>> try:
        ...     chain.sample(lambda x, t: 1e30 * x, torch.ones(1, 4, 8, 8))
        ... except dense_attn.OffGridError as error:
        ...     error.step
        0
    """

    def __init__(
        self, message: str, coordinate: float | None = None, step: int | None = None
    ) -> None:
        super().__init__(message)
        self.coordinate, self.step = coordinate, step


def off_grid(coordinate: float) -> OffGridError:
    """The error of a step that leads to a coordinate."""
    rule = "be finite and keep the latents within the grid of 2^50 steps"
    return OffGridError(f"eps must {rule}, got {coordinate:g} steps", coordinate)


def ddim_step(
    x: Tensor, eps: Tensor, eps_uncond: Tensor | None, a: float, b: float, guidance_scale: float
) -> Tensor:
    """A DDIM step or its inverse, a*x + b*(eps_uncond + guidance_scale*(eps - eps_uncond))."""
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
    """z + round(step*eps) on the grid, and its latent to_latent*z in a dtype; -step undoes it."""
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
    """far + round(c_near*near + c_eps*eps) on the grid, and its latent; -c_near, -c_eps undo it."""
    z = far + _rounded(c_near * near.double() + c_eps * eps.double())
    return _checked(z), (to_latent * z.double()).to(dtype)


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
    """A coupling (unless eps is None), then the mix divided by p as two unit shears; the latent of
    x or y.
    """
    x, y = _coupled_exactly(x, y, eps, step, couple_x)
    x = _checked(x + _rounded((1 - mix) / mix * y.double()))
    y = _checked(y + _rounded((1 - mix) * x.double()))
    return x, y, (to_latent * (x if latent_x else y).double()).to(dtype)


def exact_unmix(
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
    """A coupling, unless eps is None, the inverse shears of `exact_mix`, and a latent."""
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
        raise off_grid(change[~inside][0].item())
    return change.round().long()


def _checked(z: Tensor) -> Tensor:
    inside = z.double().abs() <= GRID_LIMIT  # torch would compare int64 with a number in float32
    if not inside.all():
        raise off_grid(z[~inside][0].item())
    return z
