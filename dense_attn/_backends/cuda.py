"""The CUDA backend: nvcc's kernels as ops under the names of the contract."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dense_attn._backends import contract, ops, raw_checks

AUTOGRAD = False  # torch does not see into its kernels
NO_KERNELS = {"tile_lists"}  # tiles of one kind are found on the way
_NAME = "dense_attn_cuda"
_ADVICE = "DENSE_ATTN_CUDA=1 pip install --no-build-isolation . where nvcc is"
_OTHER_VERSION = (
    "the CUDA library is of another version, with other arguments of its ops: install it again"
)


def _load() -> str | None:
    """Load the CUDA library, unless its ops are there already; the reason why not, or None."""
    if _said("contract") is None:
        libraries = sorted(Path(__file__).parents[1].glob("_CUDA*.so"))
        if not libraries:
            return f"the CUDA library is not built: {_ADVICE}"
        try:
            torch.ops.load_library(str(libraries[0]))
        except (OSError, RuntimeError) as error:
            return f"the CUDA library does not load: {str(error).splitlines()[0]}"
    # Kernels of another contract would read arguments that are not theirs.
    return None if _said("contract") == contract.DIGEST else _OTHER_VERSION


def _said(name: str) -> str | None:
    """The library's answer, None where it is not there."""
    op = getattr(getattr(torch.ops, _NAME), name, None)
    return None if op is None else op()


def _has_kernel(name: str) -> bool:
    key = DEVICE.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{_NAME}::{name}", key)


def attention_bytes(q: Tensor, k: Tensor) -> int:
    """The bytes that a call of layout attention takes at least: its result."""
    return q.numel() * q.element_size()


def tile_lists_for(q: Tensor, k: Tensor, *tokens: object, kept: bool) -> None:
    """None: calls take no tile lists."""


LOAD_ERROR = _load()
DEVICE = "cuda" if LOAD_ERROR else str(_said("device"))  # the kind of tensors that the ops take
LACKING: set[str] = set()  # ops that this build of the library has no kernel of

if LOAD_ERROR is None:
    _library = ops.define(_NAME)
    globals().update(ops.overloads(_NAME))
    if DEVICE == "cpu":  # emulated
        globals().update(
            {x: raw_checks.looked_at(globals()[x]) for x in ops.OPS if x.startswith("exact_")}
        )
    LACKING = {name for name in ops.OPS if name not in NO_KERNELS and not _has_kernel(name)}
