"""The order in which "auto" tries backends: by a table with its evidence, behind what `verify` has
found on this GPU.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from importlib import metadata
from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn import _tuned
from dense_attn._backends import cuda, ops, plans
from dense_attn._checks import DTYPES
from dense_attn._kernel_hashes import kernel_hashes

# Under TRITON_INTERPRET=1 "auto" interprets Triton's on the CPU.
ORDER = ("triton", "cuda", "cpu", "reference")
GPU_BACKENDS = ("triton", "cuda")
ATTENTION, GRADIENT = "layout_attention", "gradient on cuda"
_HALF, _MOST = (torch.float16, torch.bfloat16), 1 << 62
# Of the row kernels, by the largest head dim: instructions of a warp for 16 rows of 77 keys, with
# `range` in bfloat16 on sm_80 and sm_90, the fewest and the most of CUDA's, the fewest of Triton's.
ROWS_COUNTED = {
    40: (492, 1004, 977),
    64: (561, 1076, 939),
    80: (550, 1070, 1154),
    96: (584, 1119, 1205),
    128: (678, 1270, 1226),
    160: (655, 1269, 1404),
    256: (774, 1440, 1510),
}
_ONE_TURN = 64  # columns; of wider heads a turn of CUDA's loop over columns of values is counted


class Rule(NamedTuple):
    """A backend that goes first for some calls, and what says so."""

    op: str
    backend: str
    evidence: str  # "counted: ...", "measured on <GPU>: ...", or that nothing compares them
    dtypes: tuple[torch.dtype, ...] = ()  # () for all
    head_dims: tuple[int, int] | None = None  # the least and the most; None for all
    keys: tuple[int, int] | None = None
    gpus: str = "all"

    def takes(self, dtype: torch.dtype, head_dim: int, keys: int | None) -> bool:
        """Whether a call of the op is one of these; without keys none that asks for some."""
        if self.dtypes and dtype not in self.dtypes:  # before sizes, which may be symbols
            return False
        if self.keys and (keys is None or not self.keys[0] <= keys <= self.keys[1]):
            return False
        return not self.head_dims or self.head_dims[0] <= head_dim <= self.head_dims[1]

    @property
    def cells(self) -> list[str]:
        """The rule as `info` prints it, under COLUMNS."""
        dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes) or "all"
        sizes = _span(self.head_dims), _span(self.keys)
        return [self.op, self.backend, dtypes, *sizes, self.gpus, self.evidence]


COLUMNS = ("op", "first", "dtypes", "head dims", "keys", "GPUs", "evidence")


def _span(ends: tuple[int, int] | None) -> str:
    if ends is None:
        return "all"
    return f"{ends[0]} up" if ends[1] == _MOST else f"{ends[0]} to {ends[1]}"


def _few_keys(least: int, most: int) -> Rule:
    """The row kernel of CUDA for the head dims of a class."""
    fewest, longest, triton = ROWS_COUNTED[most]
    turn = " with a turn over values" if most > _ONE_TURN else ""
    said = (
        f"counted: {fewest} to {longest:,} instructions for 16 rows{turn}, Triton's {triton:,} up"
    )
    return Rule(ATTENTION, "cuda", said, _HALF, (least, most), (0, cuda.ROW_KEYS))


_SAME = "not compared: both read and write the same bytes"
_GRADIENT_DIMS = (1, cuda.GRADIENT_HEAD_DIM), (cuda.GRADIENT_HEAD_DIM + 1, cuda.HEAD_DIMS[-1])
# The first rule that takes a call. None has been measured.
RULES = (
    Rule(
        ATTENTION,
        "triton",
        "counted: from 1,024 keys on 489 cycles to issue 128 x 64 scores at 64 columns on sm_90, "
        "CUDA's 626; on sm_80, where tensor cores bind both, 786 and 622",
        _HALF,
        (1, cuda.HEAD_DIMS[-1]),
        (cuda.ROW_KEYS + 1, _MOST),
    ),
    *(_few_keys(least + 1, most) for least, most in zip((0, *cuda.HEAD_DIMS), cuda.HEAD_DIMS)),
    Rule(ATTENTION, "triton", "CUDA has no such kernels"),  # of other dtypes
    Rule(
        GRADIENT,
        "cuda",
        "counted, of a prototype: Triton's take 1.9 times the cycles at 40 columns on sm_80, "
        "1.5 at 64, 1.2 at 128",
        _HALF,
        _GRADIENT_DIMS[0],
        gpus="not {}.x, {}.x".format(*cuda.TRITON_GRADIENTS),
    ),
    Rule(
        GRADIENT,
        "triton",
        "counted, of a prototype: they take 0.9 times the cycles at 40 columns on sm_90, "
        "0.6 at 64, 0.4 at 128",
        _HALF,
        _GRADIENT_DIMS[0],
        gpus="{}.x, {}.x".format(*cuda.TRITON_GRADIENTS),
    ),
    Rule(GRADIENT, "triton", "CUDA has no such kernels", _HALF, _GRADIENT_DIMS[1]),
    *(
        Rule(op, "triton", _SAME)
        for op in ("percentile_mask", "sega_guidance", "ddim_step", "ReversibleSampler")
    ),
)
# A call must not wait for all rules to be looked at.
_RULES_OF = {
    (op, dtype): [rule for rule in RULES if rule.op == op and dtype in (rule.dtypes or (dtype,))]
    for op in {rule.op for rule in RULES}
    for dtype in DTYPES
}
_RULES_OF_HEAD_DIM = [
    [
        rule
        for rule in _RULES_OF[ATTENTION, _HALF[0]]
        if rule.head_dims is None or rule.head_dims[0] <= head_dim <= rule.head_dims[1]
    ]
    for head_dim in range(cuda.HEAD_DIMS[-1] + 1)
]
_BEHIND = {first: (first, *(name for name in ORDER if name != first)) for first in ORDER}
_AT_ONCE = {  # where the first rule takes calls of any size
    at: _BEHIND[rules[0].backend]
    for at, rules in _RULES_OF.items()
    if rules and rules[0].head_dims is rules[0].keys is None
}
# Whether `verify` passed, by backend and the GPU's index; filled where it is asked for.
_found: dict[tuple[str, int], bool | None] = {}


def order(op: str, x: Tensor, keys: int | None = None) -> tuple[str, ...]:
    """The backends as "auto" tries them for a call on inputs like x and so many keys. One that has
    passed on this GPU comes before one that nobody has checked there, and one that failed last.
    """
    names = _by_the_table(op, x, keys)
    if not x.is_cuda:  # the text of a device's type is slow to come
        return names
    found = {name: _passed(name, x.device) for name in GPU_BACKENDS}
    right = [name for name in names if found.get(name) is True]
    wrong = [name for name in names if found.get(name) is False]
    rest = [name for name in names if name not in right and name not in wrong]
    return (*right, *rest, *wrong)


def _by_the_table(op: str, x: Tensor, keys: int | None) -> tuple[str, ...]:
    dtype, head_dim = x.dtype, 0
    if (op, dtype) in _AT_ONCE:
        return _AT_ONCE[op, dtype]
    rules = _RULES_OF.get((op, dtype), ())
    if op == ATTENTION and dtype in _HALF:
        head_dim = x.shape[-1]
        rules = _RULES_OF_HEAD_DIM[head_dim] if head_dim < len(_RULES_OF_HEAD_DIM) else rules
    for rule in rules:
        if rule.takes(dtype, head_dim, keys):
            return _BEHIND[rule.backend]
    return ORDER


@ops.constant_in_graphs  # so that a compiled call chooses as any other
def _passed(backend: str, device: torch.device) -> bool | None:
    """Whether a backend has passed `verify` on a GPU; None where it was not checked."""
    index = device.index or 0
    if (backend, index) not in _found:
        _found[backend, index] = verdict(backend, torch.cuda.get_device_name(device))
    return _found[backend, index]


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
    """Keep a verdict for later processes; graphs that this one has compiled stay as they are."""
    kept = {_key(backend, gpu): {"gpu": gpu, "passed": passed}}
    _tuned.keep(_tuned.cache_file("verified.json"), kept)
    _found.clear()
    plans.forget()


def _verdicts() -> _tuned.Found:
    return _tuned.read(_tuned.cache_file("verified.json"))


def _key(backend: str, gpu: str) -> str:
    return f"{backend} on {gpu}, dense_attn {_version()}, kernels {_kernels(backend)}"


@cache
def _version() -> str:
    """The version of the library, "" where it runs without having been installed."""
    return _version_of("dense_attn")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


@cache
def _kernels(backend: str) -> str:
    """A short name of the kernels that a backend's results are made by here: the CUDA library, of
    which Triton's kernels make some gradients where they are there, and Triton's sources.
    """
    parts = [cuda.sources()] if backend == "cuda" else []
    if backend == "triton" or cuda.takes_gradients_of_triton():
        parts += [_version_of("triton"), *kernel_hashes().values()]
    return sha256("|".join(parts).encode()).hexdigest()[:16]
