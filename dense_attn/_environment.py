"""The one reader of environment variables, which refuses a value that means nothing.

Knows the standard library alone, so that setup.py can run it before anything is installed.
"""

from __future__ import annotations

import os

ON = ("1", "true", "yes", "on", "y")  # as Triton reads TRITON_INTERPRET
OFF = ("0", "false", "no", "off", "n")
FLAGS = ("DENSE_ATTN_AUTOTUNE",)  # those that a call may read


class VariableError(ValueError):
    """A variable whose value means nothing; the message is one sentence that names it."""


def flag(name: str, default: bool = False) -> bool:
    """Whether a variable is switched on; `default` where it is not set or empty."""
    value = os.environ.get(name)
    if not value:
        return default
    if value.lower() not in (*ON, *OFF):
        raise VariableError(f"{name} must be 1 or 0, got {value!r}")
    return value.lower() in ON


def text(name: str) -> str | None:
    """The text of a variable, None where it is not set or empty."""
    return os.environ.get(name) or None


def error() -> str | None:
    """The sentence with which a later call would refuse; None where it would not."""
    try:
        check()
    except VariableError as refused:
        return str(refused)
    return None


def check() -> None:
    """Refuse now what a later call would refuse."""
    for name in FLAGS:
        flag(name)
