"""The public calls whose host cost is measured, on the smallest tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dense_attn

from ..harness import machine
from ..reversible.chain import sampler
from .recorded import Call

STEPS = 50  # of the exact chain
LATENT = (1, 4, 8, 8)
_TOKENS, _HEAD_DIM = 16, 16


def randn(*shape: int) -> Tensor:
    """Random numbers, the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(machine.current().device)


def attention(
    requires_grad: bool = False, backward: bool = False
) -> tuple[Callable[[float], Call], Call]:
    """Layout attention at a strength, and plain attention: the result, or the gradients."""
    q, k, v, grad = randn(4, 1, 1, _TOKENS, _HEAD_DIM).unbind(0)
    q, k, v = (x.clone().requires_grad_(requires_grad or backward) for x in (q, k, v))
    words = torch.ones(_TOKENS, dtype=torch.int32, device=q.device)

    def result(out: Tensor) -> Tensor | tuple[Tensor, ...]:
        return torch.autograd.grad(out, (q, k, v), grad) if backward else out

    def at(strength: float) -> Call:
        rows = torch.full((1, 1, _TOKENS), strength, device=q.device)
        return lambda: result(dense_attn.layout_attention(q, k, v, words, words, rows))

    return at, lambda: result(scaled_dot_product_attention(q, k, v))


def tiled_attention(dtype: torch.dtype = torch.float32, each: bool = False) -> tuple[Call, Call]:
    """The tile lists of a layout, and layout attention with lists that are there; each: every row
    with a strength of its own.
    """
    q, k, v = randn(3, 1, 1, 16 * _TOKENS, _HEAD_DIM).to(dtype).unbind(0)
    strength = torch.full(q.shape[:3], 0.5, device=q.device) if each else 1.0
    words = torch.ones(16 * _TOKENS, dtype=torch.int32, device=q.device)
    lists = dense_attn.tile_lists(q, k, words, words)
    return (
        lambda: dense_attn.tile_lists(q, k, words, words),
        lambda: dense_attn.layout_attention(q, k, v, words, words, strength, tile_lists=lists),
    )


def percentile_mask() -> Call:
    """A mask of what lies above the 90th percentile of a few rows."""
    x = randn(4, 64)
    return lambda: dense_attn.percentile_mask(x, 0.9, dim=-1)


def ddim_step() -> Call:
    """One step of DDIM."""
    x, eps = randn(2, *LATENT)
    return lambda: dense_attn.ddim_step(x, eps, 0.5, 0.6)


def sega_step() -> Call:
    """One step of a run of semantic guidance, two concepts warm."""
    uncond, text, *edits = randn(4, *LATENT)
    edits = torch.stack(edits)
    guidance = dense_attn.SemanticGuidance(edit_warmup_steps=0)
    guidance(0, uncond, text, edits)
    return lambda: guidance(1, uncond, text, edits)


def exact_chain() -> Call:
    """An exact chain, whose network returns the same tensor at once."""
    x, eps = randn(2, *LATENT)
    chain = sampler(STEPS)
    return lambda: chain.sample(lambda x, t: eps, x)
