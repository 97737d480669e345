"""Guidance vectors: what concepts add to estimates, kept from one run and added to another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks, reference

Vectors = list[tuple[int, Tensor | None]]  # a step, and what was added in a call of it


def by_step(argument: str, vectors: object) -> dict[int, list[Tensor | None]] | None:
    """The vectors of each step, a call after the other; None without any."""
    if vectors is None:
        return None
    if not isinstance(vectors, Sequence) or not all(map(_is_entry, vectors)):
        rule = "be the list that record() returned, of a step and its vector (or None) each"
        _checks.refuse(argument, rule, type(vectors).__name__, TypeError)
    if not vectors:
        _checks.refuse(argument, "hold the vectors of a run", "none: no step was recorded")
    steps: dict[int, list[Tensor | None]] = {}
    for i, (step, vector) in enumerate(vectors):
        if step < 0:
            _checks.refuse(f"{argument}[{i}]", "be of a step of at least 0", step)
        if vector is not None:
            _checks.readable(f"{argument}[{i}]", _checks.floats(f"{argument}[{i}]", vector))
        steps.setdefault(int(step), []).append(vector)
    return steps


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, (tuple, list)) or len(entry) != 2:
        return False
    step, vector = entry
    number = isinstance(step, (int, np.integer)) and not isinstance(step, bool)
    return number and (vector is None or isinstance(vector, Tensor))


def applied(
    argument: str,
    steps: dict[int, list[Tensor | None]] | None,
    step: int,
    call: int,
    eps: Tensor,
) -> Tensor | None:
    """The vector of one call of a step, in the shape of its estimates and their wide dtype."""
    if steps is None:
        return None
    if call >= len(steps.get(step, ())):
        rule = f"hold a vector for each call of step {step}"
        _checks.refuse(argument, rule, f"{len(steps.get(step, ()))}, for steps {_named(steps)}")
    vector = steps[step][call]
    if vector is None:
        return None
    if vector.shape[1:] != eps.shape[1:] or len(vector) not in (1, len(eps)):
        rule = f"hold vectors of the estimates' shape {tuple(eps.shape)}, or of one sample's"
        _checks.refuse(argument, rule, tuple(vector.shape))
    wide = reference.accumulation_dtype(eps.dtype)
    return vector.to(eps.device, wide).expand(eps.shape)


def total(*vectors: Tensor | None) -> Tensor | None:
    """The sum of the vectors that are there."""
    there = [vector for vector in vectors if vector is not None]
    return sum(there[1:], there[0]) if there else None


def place(argument: str, device: object) -> torch.device | None:
    """The device of a recording, one that is there and holds values; None: the estimates'."""
    if device is None:
        return None
    rule = "be a device that is here and holds values"
    try:
        found = torch.empty(0, dtype=torch.uint8, device=device).device
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:  # as builds have it
        kind = TypeError if isinstance(error, TypeError) else ValueError
        _checks.refuse(argument, rule, repr(device), kind, error)
    if found.type == "meta":
        _checks.refuse(argument, rule, repr(device))
    return found


def kept(vector: Tensor | None, device: torch.device | None) -> Tensor | None:
    """A vector without its graph, on the device where a recording is kept."""
    return None if vector is None else vector.detach().to(device or vector.device)


def _named(steps: dict[int, list[Tensor | None]]) -> str:
    return f"{min(steps)} to {max(steps)}"
