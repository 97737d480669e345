# jit functions
"""Gradients in tf32 on sm_90, emulated: its products take numbers of 4 bytes in one order alone."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ptx import emulated

from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels import layout_attention as launchers
from dense_attn.triton_kernels.layout_attention import arguments

SEQLEN_Q, SEQLEN_K = 150, 140


def gradients(way: str, modulation: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients of q, k, v and strength, the second order of tiles having come by this way."""
    q = tensors[0]
    tf32 = patch.object(configs, "precision", return_value="tf32")
    turned = patch.object(arguments, "_ahead", return_value=way)
    with tf32, turned, emulated("sm_90", order="each") as runs:
        out, _, stats = launchers.layout_attention_fwd(*tensors, modulation, 0.2)
        grad = torch.linspace(-1, 1, q.numel(), dtype=q.dtype).view_as(q)
        found = launchers.layout_attention_bwd(grad, None, *tensors, out, stats, modulation, 0.2)
    assert any("wgmma.mma_async" in run.ptx for run in runs)
    return found


@pytest.mark.parametrize(
    ("head_dim", "modulation"),
    [
        pytest.param(40, "range", marks=pytest.mark.full),
        (64, "range"),
        pytest.param(128, "mask", marks=pytest.mark.full),
    ],
)
def test_turned_tiles_have_the_same_gradients(head_dim: int, modulation: str) -> None:
    """Bit by bit, since the emulated units' sums are the same in both orders of tokens."""
    torch.manual_seed(head_dim)
    q = torch.randn(1, 2, SEQLEN_Q, head_dim, dtype=torch.float32)
    k, v = torch.randn(2, 1, 2, SEQLEN_K, head_dim, dtype=torch.float32)
    words = (torch.randint(1, 4, (n,), dtype=torch.int32) for n in (SEQLEN_Q, SEQLEN_K))
    strength = torch.rand(1, 2, SEQLEN_Q, dtype=torch.float32)
    tensors = q, k, v, *words, strength
    turned, plain = (gradients(way, modulation, tensors) for way in ("turned", "as they are"))
    for name, x, y in zip(("dq", "dk", "dv", "dstrength"), turned, plain):
        assert torch.isfinite(x).all(), name
        assert torch.equal(x, y), name
