"""The order in which "auto" tries backends: by a table with its evidence, behind what `verify` has
found on this GPU.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn import _tuned
from dense_attn._kernel_hashes import kernel_hashes

# Under TRITON_INTERPRET=1 "auto" interprets Triton's on the CPU.
ORDER = ("triton", "cuda", "cpu", "reference")
_OF_GPUS = ("triton", "cuda")


class Rule(NamedTuple):
    """A backend that goes first for some calls, and what says so."""

    op: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    most_keys: int
    evidence: str  # "counted: ..." or "measured on <GPU>: ..."

    def takes(self, op: str, x: Tensor, keys: int | None) -> bool:
        """Whether a call is one of these."""
        if op != self.op or x.dtype not in self.dtypes:  # before sizes, which may be symbols
            return False
        return keys is not None and keys <= self.most_keys


RULES = (
    Rule(
        "layout_attention",
        "cuda",
        (torch.float16, torch.bfloat16),
        128,
        "counted, not measured: 492 to 1,003 instructions a warp for 16 rows, Triton's 1,018 up",
    ),
)
# Whether `verify` passed, by backend and the GPU's index; filled where it is asked for.
_found: dict[tuple[str, int], bool | None] = {}


def order(op: str, x: Tensor, keys: int | None = None) -> tuple[str, ...]:
    """The backends as "auto" tries them for a call on inputs like x and so many keys. One that has
    passed on this GPU comes before one that nobody has checked there, and one that failed last.
    """
    first = [rule.backend for rule in RULES if rule.takes(op, x, keys)]
    names = (*first, *(name for name in ORDER if name not in first))
    if x.device.type != "cuda":
        return names
    found = {name: _passed(name, x.device) for name in _OF_GPUS}
    right = [name for name in names if found.get(name) is True]
    wrong = [name for name in names if found.get(name) is False]
    rest = [name for name in names if name not in right and name not in wrong]
    return (*right, *rest, *wrong)


def _passed(backend: str, device: torch.device) -> bool | None:
    """Whether a backend has passed `verify` on a GPU; None where it was not checked."""
    index = device.index or 0
    # The compiler reads no file: it knows what calls before it have asked for.
    if (backend, index) not in _found and not torch.compiler.is_compiling():
        _found[backend, index] = verdict(backend, torch.cuda.get_device_name(device))
    return _found.get((backend, index))


def verdict(backend: str, gpu: str) -> bool | None:
    """Whether a backend's kernels passed the last `verify` on a GPU of a name."""
    return _verdicts().get(_key(backend, gpu), {}).get("passed")


def gpus(backend: str) -> dict[str, bool]:
    """The GPUs that a backend was checked on, and whether it passed."""
    return {
        kept["gpu"]: kept["passed"]
        for key, kept in _verdicts().items()
        if _key(backend, kept["gpu"]) == key
    }


def remember(backend: str, gpu: str, passed: bool) -> None:
    """Keep a verdict for later processes."""
    _found.clear()
    kept = {_key(backend, gpu): {"gpu": gpu, "passed": passed}}
    _tuned.keep(_tuned.cache_file("verified.json"), kept)


def _verdicts() -> _tuned.Found:
    return _tuned.read(_tuned.cache_file("verified.json"))


def _key(backend: str, gpu: str) -> str:
    return f"{backend} on {gpu}, kernels {_kernels(backend)}"


@cache
def _kernels(backend: str) -> str:
    """A short name of a backend's kernels as they are here: Triton's sources, the CUDA library."""
    if backend == "triton":
        parts = [name.encode() for name in kernel_hashes().values()]
    else:
        libraries = sorted(Path(__file__).parents[1].glob("_CUDA*.so"))
        parts = [library.read_bytes() for library in libraries]
    return sha256(b"".join(parts)).hexdigest()[:16]
