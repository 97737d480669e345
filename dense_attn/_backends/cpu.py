"""The CPU backend: the compiled library's ops under the names of the contract."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dense_attn._backends import contract, ops

AUTOGRAD = False  # torch does not see into its kernels
NO_KERNELS = {"tile_lists"}  # rows of queries meet keys one by one
_ADVICE = (
    "the reference runs, and Triton on GPUs; for the CPU kernels install g++ 12 or newer and then "
    "dense_attn again, or a wheel that has them"
)
_OTHER_VERSION = "the compiled library is of another version, {}: install it again"


def _load() -> str | None:
    """Load the compiled library; the reason why not, or None."""
    libraries = sorted(Path(__file__).parents[1].glob("_C.*so"))
    if not libraries:
        return f"the compiled library is missing: {_ADVICE}"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error  # torch names the file alone
        return f"the compiled library does not load: {str(cause).splitlines()[0]}"
    # Kernels of another contract would read arguments that are not theirs.
    known = getattr(torch.ops.dense_attn, "contract", None)
    if known is None or known() != contract.DIGEST:
        return _OTHER_VERSION.format("with other arguments of its ops")
    lacking = [name for name in ops.OPS if name not in NO_KERNELS and not _has_kernel(name)]
    return _OTHER_VERSION.format(f"without {', '.join(lacking)}") if lacking else None


def _has_kernel(name: str) -> bool:
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"dense_attn::{name}", "CPU")
    except RuntimeError:  # not even its name is known
        return False


def isa_error() -> str | None:
    """The reason why DENSE_ATTN_ISA lets no kernel run; None if it lets one."""
    try:
        torch.ops.dense_attn.cpu_isa()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def attention_bytes(q: Tensor, k: Tensor) -> int:
    """The bytes that a call of layout attention takes at least: its result."""
    return q.numel() * q.element_size()


def tiled(q: Tensor, k: Tensor) -> bool:
    """False: calls take no tile lists."""
    return False


LOAD_ERROR = _load()

if LOAD_ERROR is None:  # the kernels first: a library of another version brings ops of its own
    _library = ops.define("dense_attn")
    globals().update(ops.overloads("dense_attn"))
