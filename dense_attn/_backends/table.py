"""The table of backends: which can run an op, and the reasons why the others cannot."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dense_attn import _checks, _environment
from dense_attn._backends import choice, cpu, cuda, reference, triton
from dense_attn._backends.contract import MAX_HEAD_DIM

OPS = {  # each op and the file that holds it, of the same name in every folder
    "layout_attention": "layout_attention",
    "percentile_mask": "sega",
    "sega_guidance": "sega",
    "ddim_step": "reversible",
    "ReversibleSampler": "reversible",
}
# Each op's raw op that tells whether a backend has kernels of it.
_RAW = {"layout_attention": "layout_attention_fwd", "ReversibleSampler": "exact_mix"}
NAMESPACES: dict[str, ModuleType] = {
    "cuda": cuda,
    "triton": triton,
    "cpu": cpu,
    "reference": reference,
}
ORDER = tuple(NAMESPACES)
_HEAD_DIM_STEP = 8  # 16 bytes, which the CUDA kernels of layout attention load at once
_OLDEST_GPU = (8, 0)  # asynchronous copies and products of bfloat16


def missing(backend: str, op: str) -> str | None:
    """The reason why a backend lacks an op here, whatever the inputs; None if it has it."""
    kernels = NAMESPACES[backend]
    if backend == "cuda" and _RAW.get(op, op) in getattr(kernels, "LACKING", ()):
        return f"no {backend} kernel of {op} in this build"
    return getattr(kernels, "LOAD_ERROR", None)


def unavailable(backend: str, op: str) -> str | None:
    """The reason why a backend could run no call of an op on this machine; None if it could.

    Asks for GPUs, for which a call on tensors need not wait: theirs is there.
    """
    reason = missing(backend, op)
    if reason is None and device_of(backend) == "cuda":
        reason = _no_gpu() or (cuda.driver_error() if backend == "cuda" else None)
    if reason is None and (backend, op) == ("triton", "layout_attention"):
        reason = _environment.error()  # of DENSE_ATTN_AUTOTUNE, which it reads
    return cpu.isa_error() if reason is None and backend == "cpu" else reason


def _no_gpu() -> str | None:
    """The reason why no GPU can be used; None if one can."""
    if not torch.cuda.is_available():
        return "no GPU on this machine"
    try:
        reasons = [
            _too_old(torch.device("cuda", index)) for index in range(torch.cuda.device_count())
        ]
    except RuntimeError as error:  # in a forked process, for one
        return f"the GPU cannot be used: {str(error).splitlines()[0]}"
    return None if None in reasons else reasons[0]


def _too_old(device: torch.device) -> str | None:
    """The reason why a GPU cannot run the kernels; None if it can."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) >= _OLDEST_GPU:
        return None
    pairs = (_OLDEST_GPU, torch.cuda.get_device_capability(device))
    oldest, got = ("{}.{}".format(*pair) for pair in pairs)
    return f"needs a GPU of compute capability {oldest} or newer, got {got}"


def device_of(backend: str) -> str:
    """The kind of tensors that a backend takes; the reference takes any."""
    if backend == "triton":
        return triton.DEVICE
    return cuda.DEVICE if backend == "cuda" else "cpu"


def why_not(backend: str, op: str, x: Tensor, added: int = 0) -> list[str]:
    """Every reason why a backend cannot run an op on inputs like x; empty if it can. `added`: how
    many of x's columns a `k_mask` has added.
    """
    reason = missing(backend, op)
    if reason is not None:
        return [reason]
    if backend == "reference":
        return []
    reasons, device = [], device_of(backend)
    if not (x.is_cuda if device == "cuda" else x.is_cpu):
        reasons.append(f"runs on {device} tensors, got {x.device}")
    elif device == "cuda" and (reason := _too_old(x.device)):
        reasons.append(reason)
    if op == "layout_attention" and x.shape[-1] > MAX_HEAD_DIM:
        terms = f" ({x.shape[-1] - added} and {added} for k_mask)" if added else ""
        reasons.append(f"head_dim is at most {MAX_HEAD_DIM}, got {x.shape[-1]}{terms}")
    if backend == "cpu":
        return reasons
    if backend == "triton" and OPS[op] != "reversible" and x.dtype == torch.float64:
        reasons.append("has no float64 kernels")
    if backend == device == "cuda" and not reasons and (reason := cuda.driver_error()):
        reasons.append(reason)
    if (backend, op) == ("cuda", "layout_attention"):
        reasons += _why_not_cuda_attention(x)
    if (
        device == "cpu"
        and x.dtype == torch.bfloat16
        and backend == "triton"
        and triton.interpreted()
    ):
        reasons.append("computes bfloat16 wrongly in Triton's interpreter")
    return reasons


def _why_not_cuda_attention(x: Tensor) -> list[str]:
    """The reasons why the CUDA kernels of layout attention cannot take queries like x."""
    reasons = []
    if x.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"its dtype is float16 or bfloat16, got {_checks.name(x.dtype)}")
    if x.shape[-1] % _HEAD_DIM_STEP:
        reasons.append(f"head_dim is a multiple of {_HEAD_DIM_STEP}, got {x.shape[-1]}")
    return reasons


def resolve(backend: str, op: str, x: Tensor, keys: int | None = None, added: int = 0) -> str:
    """The backend that runs the call (of attention: on so many keys, with columns added for them):
    the named one or an error, or the first that can.
    """
    if backend == "auto":
        for name in choice.order(op, x, keys):
            if not why_not(name, op, x):
                return name
    _checks.choice("backend", backend, ("auto", *ORDER))
    reasons = why_not(backend, op, x, added)
    if reasons:
        _checks.refuse(
            "backend", f"be able to run {op}", f"{backend!r}: {'; '.join(reasons)}", RuntimeError
        )
    return backend


def backends() -> dict[str, dict[str, str]]:
    """For each backend and op on this machine: "available", or the reason why a call would be
    refused.

    Returns:
        A dict of backend name to a dict of op name to text.

    Example:
        >>> import dense_attn
        >>> table = dense_attn.backends()
        >>> table["reference"]["layout_attention"]
        'available'
    """
    return {
        backend: {op: unavailable(backend, op) or "available" for op in OPS} for backend in ORDER
    }
