"""The CUDA backend: nvcc's kernels as ops under the names of the contract."""

from __future__ import annotations

import re
import warnings
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from dense_attn import reference
from dense_attn._backends import contract, ops, raw_checks

AUTOGRAD = False  # torch does not see into its kernels
NO_KERNELS = {"tile_lists"}  # tiles of one kind are found on the way
HEAD_DIMS = (40, 64, 80, 96, 128, 160, 256)  # csrc/cuda/head_dims.h: a kernel takes those up to one
ROW_KEYS = 128  # kMaxRowKeys of csrc/cuda/kernels.h
GRADIENT_HEAD_DIM = 160  # kMaxBwdHeadDim there
TRITON_GRADIENTS = (9, 10)  # compute capabilities where Triton's are taken if they are there
_NAME = "dense_attn_cuda"
_QUERIES = 2  # among the arguments of layout_attention_bwd
_ADVICE = "DENSE_ATTN_CUDA=1 pip install --no-build-isolation . where nvcc is"
_driver_errors: list[str] = []  # the one answer, when it has been asked for
_OTHER_VERSION = "the CUDA library is of another version, {}: install it again"


def _load() -> str | None:
    """Load the CUDA library, unless its ops are there already; the reason why not, or None."""
    if torch.version.hip is not None:
        return "the CUDA library runs on NVIDIA's GPUs, got a torch for AMD's"
    if _said("contract") is None:
        libraries = sorted(Path(__file__).parents[1].glob("_CUDA*.so"))
        if not libraries:
            return f"the CUDA library is not built: {_ADVICE}"
        try:
            torch.ops.load_library(str(libraries[0]))
        except (OSError, RuntimeError) as error:
            cause = error.__cause__ or error  # torch names the file alone
            return f"the CUDA library does not load: {str(cause).splitlines()[0]}"
    # Kernels of another contract would read arguments that are not theirs.
    if _said("contract") != contract.DIGEST:
        return _OTHER_VERSION.format("with other arguments of its ops")
    if not re.fullmatch(r"[0-9a-f]{16}", sources()):
        return _OTHER_VERSION.format(f"which must name its sources, got {sources()!r}")
    return None


def sources() -> str:
    """The digest of what the library is made of, which its build has put into it."""
    return _said("sources") or ""


def takes_gradients_of_triton() -> bool:
    """Whether some gradients are by Triton's kernels: those of wide heads, on some GPUs all."""
    return _has_kernel("dense_attn_triton", "layout_attention_bwd")


@ops.constant_in_graphs
def driver_error() -> str | None:
    """The reason why the driver runs no kernel of the library; None if it may. Asking initialises
    the driver, which an import must not.
    """
    if not _driver_errors:
        _driver_errors.append(_said("driver_error") or "")
    return f"the CUDA library {_driver_errors[0]}" if _driver_errors[0] else None


def _said(name: str) -> str | None:
    """The library's answer, None where it is not there."""
    op = getattr(getattr(torch.ops, _NAME), name, None)
    return None if op is None else op()


def _has_kernel(library: str, name: str) -> bool:
    if not hasattr(getattr(torch.ops, library), name):
        return False
    key = DEVICE.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{name}", key)


def gradient_of_attention(q: Tensor | None = None) -> str:
    """The backend whose kernels make the gradient of layout attention, at queries like these or at
    usual ones. All take it from the same record of each row. Triton's are asked for late, when
    every backend has been loaded.
    """
    device = torch.device(DEVICE) if q is None else q.device
    own = _has_kernel(_NAME, "attention_gradient")
    own = own and (q is None or q.shape[3] <= GRADIENT_HEAD_DIM)
    triton = takes_gradients_of_triton()
    if own and not (triton and _multiplies_by_warp_groups(device)):
        return "cuda"
    return "triton" if triton else "reference"


def _multiplies_by_warp_groups(device: torch.device) -> bool:
    """Whether Triton's kernels have products there that the CUDA kernels' gradients lack: by count
    theirs take 0.9 times the cycles at 40 columns on 9.0, and 0.6 at 64; on 8.0 1.9 and 1.5 times.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device)[0] in TRITON_GRADIENTS


def _layout_attention_bwd(*arguments: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradient by the kernels that are to make it."""
    backend = gradient_of_attention(arguments[_QUERIES])
    if backend == "cuda":
        return _of_groups(torch.ops.dense_attn_cuda.attention_gradient(*arguments), *arguments[2:5])
    if backend == "triton":
        return torch.ops.dense_attn_triton.layout_attention_bwd(*arguments)
    _warn_of_the_reference()
    raw_checks.layout_attention_bwd(*arguments)
    return _gradient_by_the_reference(*arguments)


def _of_groups(
    grads: tuple[Tensor, Tensor, Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients, dk and dv summed over the heads of q that meet one of k and v."""
    if q.shape[1] == k.shape[1]:
        return grads
    dq, *parts, dstrength = grads
    dk, dv = (ops.empty_rows_like(x) for x in (k, v))
    for grad, each in zip((dk, dv), parts):
        groups = each.unflatten(1, (k.shape[1], q.shape[1] // k.shape[1]))
        grad.copy_(groups.sum(2, dtype=torch.float32))
    return dq, dk, dv, dstrength


@cache
def _warn_of_the_reference() -> None:
    warnings.warn(
        "the gradient of layout_attention on CUDA kernels is the reference's, slow and with "
        "memory for all scores: neither these kernels nor Triton make it here",
        stacklevel=3,
    )


def _gradient_by_the_reference(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    strength: Tensor | None,
    out: Tensor,
    stats: Tensor,
    modulation: str,
    scale: float,
    q_order: Tensor | None,
    k_order: Tensor | None,
    every_strength: float = 1.0,
    seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dv, dstrength) in float32, rounded at the end."""
    c = q.new_full(q.shape[:3], every_strength, dtype=torch.float32)
    c = c if strength is None else strength
    inputs = [x.detach().float().requires_grad_() for x in (q, k, v, c)]
    if q.numel() == 0 or k.numel() == 0:
        grads = [torch.zeros_like(x) for x in inputs]
    else:
        with torch.enable_grad():
            *qkv, c = inputs
            rule = {"modulation": modulation, "scale": scale, "k_mask": None}
            if seqlens_k is not None:
                keys = torch.arange(k.shape[2], dtype=torch.int32, device=k.device)
                rule["k_mask"] = keys < seqlens_k[:, None]
            results = reference.layout_attention(*qkv, q_regions, k_regions, c, **rule)
            flowing = (grad_out.float(), torch.zeros_like(c) if grad_lse is None else grad_lse)
            grads = torch.autograd.grad(results, inputs, flowing, materialize_grads=True)
    dq, dk, dv = (x.to(q.dtype) for x in grads[:3])
    return dq, dk, dv, grads[3]


def attention_bytes(q: Tensor, k: Tensor) -> int:
    """The bytes that a call of layout attention takes at least: its result."""
    return q.numel() * q.element_size()


def tiled(q: Tensor, k: Tensor) -> bool:
    """False: calls take no tile lists."""
    return False


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
    _library.impl("layout_attention_bwd", _layout_attention_bwd, DEVICE.upper())
    LACKING = {x for x in ops.OPS if x not in NO_KERNELS and not _has_kernel(_NAME, x)}
