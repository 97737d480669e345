"""Tensors whose parts lie more than 2^31 elements apart; only written pages take memory."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from cases import MODULATIONS, backends
from torch import Tensor

from dense_attn import ddim_step, layout_attention, percentile_mask, sega_guidance

APART = 2**31 + 64  # elements; offsets of 32 bits wrap around to others that are never written
on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))


@cache
def memory() -> Tensor:
    """Room for two of them, promised by the system but not taken."""
    try:
        return torch.empty(2 * APART, dtype=torch.bfloat16)
    except (
        RuntimeError
    ) as error:  # a limit on address space, or a system that promises no more than it has
        pytest.skip(f"no 8 GB of address space: {error}")


def far(x: Tensor, dim: int, place: int) -> Tensor:
    """The values of x where each index of a dimension is `APART` further, at a place of its own."""
    strides = [stride if i != dim else APART for i, stride in enumerate(x.stride())]
    assert x.shape[dim] == 2
    return memory().as_strided(x.shape, strides, place * 4096).copy_(x)


@on_cpu
@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("dim", [0, 1], ids=["batch", "heads"])
def test_layout_attention(dim: int, modulation: str, backend: str) -> None:
    near = [x.bfloat16().requires_grad_() for x in torch.randn(3, 2, 2, 20, 16)]
    apart = [far(x.detach(), dim, place).requires_grad_() for place, x in enumerate(near)]
    words, grad = (
        torch.arange(20, dtype=torch.int32) % 4,
        far(torch.randn(2, 2, 20, 16).bfloat16(), dim, 3),
    )
    outs = []
    for q, k, v in (near, apart):
        outs.append(
            layout_attention(q, k, v, words, words, 0.5, modulation=modulation, backend=backend)
        )
        outs[-1].backward(grad)
    assert torch.equal(*outs)
    assert all(torch.equal(x.grad, y.grad) for x, y in zip(near, apart))


@on_cpu
def test_one_step_of_the_others(backend: str) -> None:
    near = list(torch.randn(4, 2, 4, 6, 5).bfloat16())
    apart = [far(x, 0, place) for place, x in enumerate(near)]
    options = {"edit_guidance_scale": 5.0, "edit_threshold": 0.9, "edit_weights": 1.0}
    options |= {"warm": [True], "enabled": [True], "reverse": [False], "backend": backend}
    options |= {"guidance_scale": 7.5, "edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    results = []
    for x, text, edit, momentum in (near, apart):
        guided = {"eps_uncond": edit, "guidance_scale": 3.0, "backend": backend}
        results.append(
            (
                *percentile_mask(x, 0.7, backend=backend),
                *sega_guidance(x, text, edit[None], momentum, **options),
                ddim_step(x, text, 0.5, 0.6, **guided),
            )
        )
    assert all(map(torch.equal, *results))
