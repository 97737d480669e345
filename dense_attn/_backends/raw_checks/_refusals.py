"""The error and the rules that raw calls of every family share."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch

from dense_attn import _checks

_Check = TypeVar("_Check", bound=Callable)


def of_a_raw_call(check: _Check) -> _Check:
    """The check with refusals that are the RuntimeError which every raw op raises."""

    @wraps(check)
    def checked(*arguments: object, **named: object) -> None:
        try:
            check(*arguments, **named)
        except (ValueError, TypeError) as error:
            raise RuntimeError(*error.args) from None

    return checked


def one_of(argument: str, dtype: torch.dtype, allowed: tuple[torch.dtype, ...]) -> None:
    """Require one of some dtypes."""
    if dtype not in allowed:
        names = ", ".join(map(_checks.name, allowed))
        _checks.refuse(argument, f"be one of {names}", _checks.name(dtype), TypeError)
