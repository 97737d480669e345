"""Memory: what a call adds to the process at its peak, and what to say when there is too little."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import torch

Result = TypeVar("Result")
_TOO_LITTLE = (  # torch's own words: it has no type for an allocation that fails on a CPU
    "DefaultCPUAllocator",
    "CUDA out of memory",  # of the CUDA library, whose errors come without their types
    "Storage size calculation overflowed",
)


class Sized(Protocol):
    """A tensor, or what is known of one."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def explain(error: RuntimeError, op: str, least: int, **tensors: Sized) -> None:
    """Raise an error of too little memory again with what asked for it and the bytes it needs.

    torch's words stay in it, since programs that try again with less look for them. Any other error
    is left alone.
    """
    text = str(error)
    if not (
        isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _TOO_LITTLE)
    ):
        return
    first = next(iter(tensors.values()))
    shapes = " and ".join(f"{name} of shape {tuple(x.shape)}" for name, x in tensors.items())
    got = f"{shapes} in {str(first.dtype).removeprefix('torch.')} on {first.device}"
    rule = f"must fit into memory, got {got}, which takes at least {least} bytes"
    raise torch.OutOfMemoryError(f"{op} {rule}: {text.splitlines()[0]}") from error


def peak_extra_bytes(call: Callable[[], Result]) -> tuple[int | None, Result]:
    """The bytes by which the process grows at most while call() runs, and the call's result.

    The result is among them. They are the system's own high-water mark of resident memory, so
    nothing that allocates can hide. Call once before: first calls load code and start threads. None
    where the system has no such mark.
    """
    try:
        # Freed memory that malloc keeps would hide new allocations.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None, call()
    result = call()
    return max(0, _status_bytes("VmHWM") - before), result


def _status_bytes(name: str) -> int:
    status = Path("/proc/self/status").read_text(errors="replace")
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", status)[1])
