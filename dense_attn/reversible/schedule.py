"""Schedules and timesteps: what a chain is given, checked and as numbers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dense_attn import _checks

_ROUNDING = 2.0**-8  # bfloat16's: by this part an entry may rise above its neighbour


def alpha_bar(argument: str, value: float | Tensor, where: str = "") -> float:
    """Require a number or a 0-d tensor in (0, 1]."""
    if type(value) is float and 0 < value <= 1:
        return value
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        value = _checks.readable(argument, value).item()
    return above_0(argument, value, where, "be a number or a 0-d tensor")


def above_0(argument: str, value: float, where: str = "", rule: str = "be a number") -> float:
    """Require a number in (0, 1]."""
    number = _checks.number(argument, value, rule=rule, where=where)
    if not 0 < number <= 1:
        _checks.refuse(argument, "be in (0, 1]", f"{value}{where}")
    return number


def schedule(
    alphas_cumprod: Tensor | Sequence[float], timesteps: Sequence[int], final: object
) -> list[float]:
    """alpha_bar at each timestep, and where the last step goes; other entries may be anything."""
    if isinstance(alphas_cumprod, Tensor):
        _checks.readable("alphas_cumprod", alphas_cumprod)
        if alphas_cumprod.dim() != 1 or not alphas_cumprod.is_floating_point():
            got = f"{_checks.name(alphas_cumprod.dtype)} {tuple(alphas_cumprod.shape)}"
            _checks.refuse("alphas_cumprod", "be one-dimensional, of floats", got)
        alphas_cumprod = alphas_cumprod.double().tolist()
    _iterable("alphas_cumprod", alphas_cumprod)
    alphas_cumprod = list(alphas_cumprod)
    if not alphas_cumprod:
        _checks.refuse("alphas_cumprod", "have at least one element", "none")
    if timesteps[0] >= len(alphas_cumprod):
        rule = f"be below the {len(alphas_cumprod)} of alphas_cumprod"
        _checks.refuse("timesteps", rule, timesteps[0])
    if final is None:
        timesteps = [*timesteps, 0]
    bars = [alpha_bar("alphas_cumprod", alphas_cumprod[t], f" at timestep {t}") for t in timesteps]
    for step, highest in enumerate(accumulate(bars[:-1], max), 1):
        if bars[step] < highest * (1 - _ROUNDING):
            before = f"{highest:.6g} at timestep {timesteps[bars.index(highest)]}"
            got = f"{before} and {bars[step]:.6g} at timestep {timesteps[step]}"
            _checks.refuse("alphas_cumprod", "not rise with the timesteps used", got)
    return bars if final is None else [*bars, alpha_bar("final_alpha_cumprod", final)]


def descending(timesteps: Tensor | Sequence[int]) -> tuple[list[object], list[int]]:
    """The elements of timesteps as they come out of it, and as integers."""
    if isinstance(timesteps, Tensor) and _checks.readable("timesteps", timesteps).dim() != 1:
        _checks.refuse("timesteps", "be one-dimensional", tuple(timesteps.shape))
    _iterable("timesteps", timesteps)
    elements = list(timesteps)
    try:
        numbers = [_index(t) for t in elements]
    except TypeError:
        kind = _checks.name(timesteps.dtype) if isinstance(timesteps, Tensor) else elements
        _checks.refuse("timesteps", "be integers", kind, TypeError)
    if not numbers:
        _checks.refuse("timesteps", "have at least one element", "none")
    if any(a <= b for a, b in pairwise(numbers)) or numbers[-1] < 0:
        _checks.refuse("timesteps", "descend to 0 or above", numbers)
    return elements, numbers


def _index(t: object) -> int:
    """An integer; a TypeError for what is none, a bool among them."""
    if isinstance(t, Tensor):
        _checks.readable("timesteps", t)
    if isinstance(t, bool) or (isinstance(t, Tensor) and t.dtype == torch.bool):
        raise TypeError
    return operator.index(t)


def _iterable(argument: str, value: object) -> None:
    if not isinstance(value, Iterable) or isinstance(value, (Mapping, Set, str, bytes)):
        _checks.refuse(argument, "be a tensor or a sequence", type(value).__name__, TypeError)
