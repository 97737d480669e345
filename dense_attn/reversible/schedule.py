"""Schedules and timesteps: what a chain is given, checked and as numbers."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NoReturn

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.reversible.moments import Moment, of_alpha_bar, of_flow, of_ratio

_ROUNDING = 2.0**-8  # bfloat16's: by this part an entry may rise above its neighbour


@dataclass(frozen=True)
class Schedule:
    """Timesteps and the moments of a chain: one at each of them, and where the last step goes."""

    timesteps: list[object]  # as eps_fn is handed them
    moments: list[Moment]
    given: str  # "alphas_cumprod" or "sigmas"
    flow: bool = False

    def numbers(self) -> dict[str, list[float]]:
        """The numbers that tell it from other schedules."""
        steps = {"timesteps": [_plain_number(t) for t in self.timesteps]}
        if self.flow:
            return steps | {"sigmas": [moment.u for moment in self.moments]}
        return steps | {"alpha_bars": [moment.signal for moment in self.moments]}

    def require_noise_to_fall(self, purpose: str) -> None:
        """Refuse a step that leaves u where it was, or that adds to it."""
        change = "grow" if self.given == "alphas_cumprod" else "fall"
        for step, (now, then) in enumerate(pairwise(self.moments)):
            if then.u >= now.u:
                rule = f"{change} at every step, the last one included, {purpose}"
                got = f"{self._given(then):.4g} after {self._given(now):.4g} at step {step}"
                _checks.refuse(self.given, rule, got)

    def refuse_noise(self, purpose: str) -> NoReturn:
        """Refuse a schedule for its noisiest moment."""
        size = "larger" if self.given == "alphas_cumprod" else "smaller"
        noisiest = min(self.moments, key=lambda moment: moment.signal)
        _checks.refuse(self.given, f"be {size} {purpose}", self._given(noisiest))

    def _given(self, moment: Moment) -> float:
        return moment.signal if self.given == "alphas_cumprod" else moment.u


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


def from_alphas(
    alphas_cumprod: Tensor | Sequence[float], timesteps: Tensor | Sequence[int], final: object
) -> Schedule:
    """DDIM's schedule, from a table of alpha_bar by timestep; `final` is where the last step goes,
    alphas_cumprod[0] when None.
    """
    elements, numbers = descending(timesteps)
    bars = _alpha_bars(alphas_cumprod, numbers, final)
    return Schedule(elements, [of_alpha_bar(bar) for bar in bars], "alphas_cumprod")


def from_ratios(sigmas: Tensor | Sequence[float], timesteps: Tensor | Sequence[float]) -> Schedule:
    """DDIM's schedule, from noise over signal at each timestep and where the last step goes."""
    elements, numbers = _per_step(sigmas, timesteps, torch.finfo(torch.float32).max)
    if any(now < then for now, then in pairwise(numbers)):
        _checks.refuse("sigmas", "not rise", numbers)
    return Schedule(elements, [of_ratio(sigma) for sigma in numbers], "sigmas")


def from_flow(sigmas: Tensor | Sequence[float], timesteps: Tensor | Sequence[float]) -> Schedule:
    """A rectified flow's schedule: sigma at each timestep and where the last step goes."""
    elements, numbers = _per_step(sigmas, timesteps, 1.0)
    if numbers not in (sorted(numbers), sorted(numbers, reverse=True)):
        _checks.refuse("sigmas", "fall, or rise, all along", numbers)
    return Schedule(elements, [of_flow(sigma) for sigma in numbers], "sigmas", flow=True)


def _per_step(
    sigmas: Tensor | Sequence[float], timesteps: Tensor | Sequence[float], most: float
) -> tuple[list[object], list[float]]:
    """Timesteps as they come out of what was given, and one number more: each in [0, most]."""
    for argument, given in (("timesteps", timesteps), ("sigmas", sigmas)):
        if isinstance(given, Tensor) and _checks.readable(argument, given).dim() != 1:
            _checks.refuse(argument, "be one-dimensional", tuple(given.shape))
        _iterable(argument, given)
    elements = list(timesteps)
    sigmas = sigmas.tolist() if isinstance(sigmas, Tensor) else list(sigmas)
    if not elements:
        _checks.refuse("timesteps", "have at least one element", "none")
    if len(sigmas) != len(elements) + 1:
        _checks.refuse("sigmas", f"be one more than the {len(elements)} timesteps", len(sigmas))
    numbers = [_checks.number("sigmas", sigma) for sigma in sigmas]
    for number in numbers:
        if not 0 <= number <= most:
            _checks.refuse("sigmas", f"be in [0, {most:g}]", number)
    return elements, numbers


def _plain_number(timestep: object) -> float:
    """A timestep out of its tensor; a whole one as an integer."""
    return int(timestep) if float(timestep).is_integer() else float(timestep)


def _alpha_bars(
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
