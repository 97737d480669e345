"""Plain attention is attention: forward and backward, through the interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn.benchmarks.compiled import plain_attention
from dense_attn.benchmarks.compiled.plain_attention import Tile
from dense_attn.triton_kernels.parts import head_parts

DEVICE = "cpu" if triton.knobs.runtime.interpret else "cuda"
SMALL = Tile(32, 16, 4, 1)
SHAPES = {  # queries, keys, head dim
    "two parts": (50, 70, 40),
    "whole tiles": (64, 48, 32),
    "few keys": (33, 7, 80),
    "few queries": (3, 65, 16),
    "one of each": (1, 1, 8),
    "twins": (20, 20, 256),
}


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    """(out, lse, dq, dk, dv) in float64."""
    q, k, v = leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = scaled_dot_product_attention(q, k, v, scale=scale)
    lse = (q @ k.mT * scale).logsumexp(-1)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, grad.double())]


def ours(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> list[Tensor]:
    out, lse = plain_attention.attention_fwd(q, k, v, scale, SMALL)
    grads = plain_attention.attention_bwd(grad, q, k, v, out, lse, scale, (SMALL, SMALL))
    return [out, lse, *grads]


def inputs(shape: str, dtype: torch.dtype, heads: tuple[int, int] = (1, 1)) -> list[Tensor]:
    """q, k, v and the gradient of out, the heads of a token beside one another in memory."""
    seqlen_q, seqlen_k, head_dim = SHAPES[shape]
    found = []
    for seqlen in (seqlen_q, seqlen_k, seqlen_k, seqlen_q):
        sizes = (heads[0], seqlen, heads[1], head_dim)
        x = torch.randn(sizes, dtype=torch.float32, device="cpu")
        found.append(x.to(DEVICE, dtype).transpose(1, 2))
    return found


def close(got: list[Tensor], expected: list[Tensor], units: int = 16) -> None:
    """Each within so many units of rounding of its largest number, or of 1, as inputs are."""
    for one, right in zip(got, expected, strict=True):
        assert one.shape == right.shape
        allowed = units * torch.finfo(one.dtype).eps * right.abs().max().clamp(min=1)
        assert (one - right).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_plain_attention(shape: str, dtype: torch.dtype) -> None:
    tensors = inputs(shape, dtype)
    scale = tensors[0].shape[3] ** -0.5
    close(ours(*tensors, scale), exact(*tensors, scale))


def test_samples_and_heads() -> None:
    """And a scale that is not the usual one."""
    tensors = inputs("few keys", torch.float32, heads=(2, 3))
    close(ours(*tensors, 0.25), exact(*tensors, 0.25))


def test_what_does_not_exist_weighs_nothing() -> None:
    """Scores so far below zero that a key of zeros would outweigh all others."""
    q, k, v, grad = inputs("two parts", torch.float32)
    tensors = q.abs() * 8, -k.abs() * 8, v, grad
    close(ours(*tensors, 1.0), exact(*tensors, 1.0), units=1 << 14)


def test_parts_are_those_of_layout_attention() -> None:
    for head_dim in range(8, 257, 8):
        assert plain_attention.head_parts(head_dim) == head_parts(
            "bwd_kv", "sm_90", "half", head_dim
        )


def test_refusals() -> None:
    q, k, v, _ = inputs("two parts", torch.float32)
    with pytest.raises(ValueError, match="scale must be positive, got 0"):
        plain_attention.attention_fwd(q, k, v, 0)
    with pytest.raises(ValueError, match="q and k must not be empty, got"):
        plain_attention.attention_fwd(q, k[:, :, :0], v[:, :, :0], 1.0)
    with pytest.raises(ValueError, match="strides must be multiples of 8 but for a last one of 1"):
        plain_attention.attention_fwd(q[..., :36].contiguous(), k, v, 1.0)
