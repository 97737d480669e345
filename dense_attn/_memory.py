"""Memory: what a call adds to the process at its peak, and what to say when there is too little."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
_TOO_LITTLE = (
    "DefaultCPUAllocator",
    "Storage size calculation overflowed",
)  # torch has no type for those of a CPU


def explain(error: RuntimeError, op: str, least: int, **tensors: Tensor) -> None:
    """Raise an error of too little memory again with what asked for it and the bytes that it takes
    at least.

    torch's words stay in it, since programs that try again with less look for them. Any other error
    is left alone.
    """
    if _is_too_little(error):
        _raise(_text(op, least, tensors), error)


class Explained:
    """`explain` around blocks, any number of them; holds no tensor."""

    def __init__(self, op: str, least: int, **tensors: Tensor) -> None:
        self._text = _text(op, least, tensors)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, RuntimeError) and _is_too_little(error):
            _raise(self._text, error)


def _is_too_little(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in _TOO_LITTLE
    )


def _text(op: str, least: int, tensors: dict[str, Tensor]) -> str:
    first = next(iter(tensors.values()))
    shapes = " and ".join(f"{name} of shape {tuple(x.shape)}" for name, x in tensors.items())
    of = f"{str(first.dtype).removeprefix('torch.')} on {first.device}"
    return f"{op} must fit into memory, got {shapes} in {of}, which takes at least {least} bytes"


def _raise(text: str, error: RuntimeError) -> None:
    raise torch.OutOfMemoryError(f"{text}: {str(error).splitlines()[0]}") from error


def peak_extra_bytes(call: Callable[[], Result]) -> tuple[int | None, Result]:
    """Bytes by which the process grows at most while call() runs, its result included, and the
    result.

    The system's own high-water mark of resident memory, so nothing that allocates can hide. Call
    once before: first calls load code and start threads. None where the system has no such mark.
    """
    try:
        ctypes.CDLL(None).malloc_trim(
            0
        )  # freed memory that malloc keeps would hide new allocations
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None, call()
    result = call()
    return max(0, _status_bytes("VmHWM") - before), result


def _status_bytes(name: str) -> int:
    return 1024 * int(
        re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(errors="replace"))[1]
    )
