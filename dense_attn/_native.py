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
        lse = q.new_empty(q.shape[:3], dtype=strength.dtype)
        return torch.empty_like(q), lse, q.new_empty((*q.shape[:3], 4), dtype=strength.dtype)

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
        grads = [torch.empty_like(x) for x in (q, k, v)]
        return *grads, q.new_empty(q.shape[:3], dtype=strength.dtype)
