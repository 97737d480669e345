"""The CPU backend: the compiled library's ops under the names of the table, and their fake kernels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def _load() -> str | None:
    """Load the compiled library; the reason why not, or None."""
    libraries = sorted(Path(__file__).parent.glob("_C*.so"))
    if not libraries:
        return "the compiled library is missing: install dense_attn from a wheel or with a C++ compiler"
    try:
        torch.ops.load_library(str(libraries[0]))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {error}"
    return None


def _empty_rows_like(q: Tensor) -> Tensor:
    """In q's memory order, unless that leaves the last axis apart; the compiled kernel has the same rule."""
    like = torch.empty_like(q)
    return like if q.shape[3] == 1 or like.stride(3) == 1 else q.new_empty(q.shape)


def _check_devices(q: Tensor, **others: Tensor | None) -> None:
    """One meta tensor among real ones brings a real call here, where it would get results without values."""
    for name, other in others.items():
        if other is not None and other.device != q.device:
            raise RuntimeError(f"{name} must be on q's device {q.device}, got {other.device}")


LOAD_ERROR = _load()

if LOAD_ERROR is None:
    layout_attention_fwd = torch.ops.dense_attn.layout_attention_fwd.default
    layout_attention_bwd = torch.ops.dense_attn.layout_attention_bwd.default

    @torch.library.register_fake("dense_attn::layout_attention_fwd")
    def _(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_regions: Tensor,
        k_regions: Tensor,
        strength: Tensor,
        modulation: str,
        scale: float,
        q_order: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens = {"q_regions": q_regions, "k_regions": k_regions, "q_order": q_order}
        _check_devices(q, k=k, v=v, strength=strength, **tokens)
        lse = q.new_empty(q.shape[:3], dtype=strength.dtype)
        return _empty_rows_like(q), lse, q.new_empty((*q.shape[:3], 4), dtype=strength.dtype)

    @torch.library.register_fake("dense_attn::layout_attention_bwd")
    def _(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_regions: Tensor,
        k_regions: Tensor,
        strength: Tensor,
        out: Tensor,
        stats: Tensor,
        modulation: str,
        scale: float,
        q_order: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tokens = {"q_regions": q_regions, "k_regions": k_regions, "q_order": q_order}
        saved = {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "stats": stats}
        _check_devices(q, k=k, v=v, strength=strength, **tokens, **saved)
        grads = [_empty_rows_like(x) for x in (q, k, v)]
        return *grads, q.new_empty(q.shape[:3], dtype=strength.dtype)
