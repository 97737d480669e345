"""What a call adds to the memory of the process at its peak, as the operating system saw it."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")


def peak_extra_bytes(call: Callable[[], Result]) -> tuple[int | None, Result]:
    """Bytes by which the process grows at most while call() runs, its result included, and the result.

    The system's own high-water mark of resident memory, so nothing that allocates can hide. Call once before: first
    calls load code and start threads. None where the system has no such mark.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that malloc keeps would hide new allocations
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = _status_bytes("VmRSS")
    except (OSError, AttributeError):
        return None, call()
    result = call()
    return max(0, _status_bytes("VmHWM") - before), result


def _status_bytes(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text(errors="replace"))[1])
