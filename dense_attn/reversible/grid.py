"""The integer grid of exact chains: latents there and back, and what is said when one leaves it."""

from __future__ import annotations

import math
from functools import partial
from types import ModuleType
from typing import NoReturn

import torch
from torch import Tensor

from dense_attn import _checks, reference
from dense_attn.reference import OffGridError
from dense_attn.reversible.links import Chain

_RULE = "be finite and keep the latents within the grid of 2^50 steps"
_PARTED = (
    "; EDICT parts a pair by mix^(-2*steps) on the way to the noise: "
    "a pair that was sampled, fewer steps or a mix nearer 1 may help"
)


def to_grid(x: Tensor, scale: float, argument: str) -> Tensor:
    """The integers of latents: round(x / scale), int64."""
    z = (x.double() / scale).round()
    largest = z.abs().max().item() if z.numel() else 0.0
    if not largest <= reference.GRID_LIMIT:
        rule = f"be finite and at most {reference.GRID_LIMIT * scale:.3g} in size for exact=True"
        got, cause = f"{largest * scale:.3g}", reference.off_grid(largest)
        _checks.refuse(argument, rule, got, cause=cause)
    return z.long()


def from_grid(z: Tensor, scale: float) -> Tensor:
    """The latents of integers, float64: `to_grid` gives the same integers back."""
    return z.double() * scale


def call(kernels: ModuleType, op: str, *arguments: object) -> tuple[Tensor, ...]:
    """The results of an op on the grid; an OffGridError where a number leaves it.

    Kernels in C++ raise nothing but RuntimeError, so the reference says whether that is the reason.
    """
    try:
        return getattr(kernels, op)(*arguments)
    except (OffGridError, torch.OutOfMemoryError):
        raise
    except RuntimeError:
        reason = _reason(op, arguments)
        if reason is None:
            raise
        raise reason from None


def _reason(op: str, arguments: tuple[object, ...]) -> OffGridError | None:
    """The number that left the grid in a call that failed, None if none did."""
    try:
        getattr(reference, op)(*arguments)
    except OffGridError as error:
        return error
    except RuntimeError:
        return None
    return None


def left(error: Exception) -> bool:
    """Whether a run was refused because the latents it was given, or became, are off the grid."""
    return isinstance(error, OffGridError) or isinstance(error.__cause__, OffGridError)


def refuse_given(argument: str, chain: Chain, error: OffGridError) -> NoReturn:
    """Refuse latents that a chain cannot start from."""
    _checks.refuse(argument, _RULE, _found(chain, error), cause=error)


def refuse_eps(chain: Chain, error: OffGridError, step: int, timestep: object) -> NoReturn:
    """Raise an OffGridError again in the words of the chain, with its step."""
    got = _found(chain, error, f" at step {step} (timestep {timestep})")
    kind = partial(OffGridError, coordinate=error.coordinate, step=step)
    _checks.refuse("eps_fn's result", _RULE, got, kind, error)


def require_on_grid(chain: Chain, *latents: Tensor) -> None:
    """Refuse what kernels have marked instead of raising, which would wait for a GPU every step."""
    for z in latents:
        largest = z.abs().max().item() if z.numel() else 0
        if largest > reference.GRID_LIMIT:
            got = f"latents that left it on the way{_advice(chain)}"
            _checks.refuse("eps_fn's result", _RULE, got, OffGridError)


def _found(chain: Chain, error: OffGridError, where: str = "") -> str:
    advice = _advice(chain) if math.isfinite(error.coordinate) else ""
    return f"{error.coordinate:g} grid steps{where}{advice}"


def _advice(chain: Chain) -> str:
    """Advice on how a chain stays on the grid."""
    return _PARTED if chain.first == "unmix" and chain.mix < 1 else ""
