"""The numbers of `apply_layout` that regions with prompts have, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dense_attn import _checks

from ..options.numbers import sigma_of


@dataclass(frozen=True)
class Options:
    """The numbers of one block."""

    base_ratio: float
    isolate: float
    window: tuple[float, float]  # of the steps
    active_sigma: float | None  # in its place
    every: int  # n-th layer
    area_scaling: bool
    backend: str

    @property
    def active(self) -> float:
        """The end of the window."""
        return self.window[1]


def options_of(numbers: dict[str, Any], backend: str, base: bool) -> Options:
    """The numbers of a call; `base`: whether there is a prompt beside the regions'."""
    ratio = _checks.fraction("base_ratio", numbers["base_ratio"])
    if ratio and not base:
        _checks.refuse("base_ratio", "be 0 where prompt is None", numbers["base_ratio"])
    every = numbers["every"]
    if isinstance(every, bool) or not isinstance(every, (int, np.integer)):
        _checks.refuse("every", "be a whole number", type(every).__name__, TypeError)
    if every < 1:
        _checks.refuse("every", "be at least 1", every)
    isolate, window = _checks.fraction("isolate", numbers["isolate"]), _window(numbers["active"])
    sigma = sigma_of(numbers)
    if not base and every != 1:  # other layers and steps would see the call's prompt
        _checks.refuse("every", "be 1 where prompt is None", every)
    if not base and window != (0, 1):
        _checks.refuse("active", "be the whole run where prompt is None", numbers["active"])
    if not base and sigma is not None:
        _checks.refuse("active_sigma", "be None where prompt is None", sigma)
    area_scaling = _checks.flag("area_scaling", numbers["area_scaling"])
    return Options(ratio, isolate, window, sigma, int(every), area_scaling, backend)


def _window(active: Any) -> tuple[float, float]:
    """The steps from one part of a run to another."""
    if active is None:
        return 0.0, 1.0
    if not isinstance(active, (tuple, list)):
        return 0.0, _checks.fraction("active", active)
    if len(active) != 2:
        _checks.refuse("active", "be a number or a pair (start, stop)", f"{len(active)} numbers")
    start, stop = (_checks.fraction(f"active[{i}]", end) for i, end in enumerate(active))
    if start > stop:
        _checks.refuse("active", "have start <= stop", active)
    return start, stop
