"""What a user would pick instead of `layout_attention`, each exact, each `prepare(inputs) -> call(q, k, v) -> out`.

What depends on the layout alone (masks, words, compilation) is prepared once and not timed. The modulation is `range`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn import layout_attention
from dense_attn._step import official_attention

from .workloads import Inputs

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
_HARD = 2.0**20  # softmax of the scores times this is 1 at the largest score and 0 elsewhere


def dense_attn(inputs: Inputs, backend: str = "auto") -> Call:
    """This library."""
    words = inputs.q_regions, inputs.k_regions, inputs.strength
    return lambda q, k, v: layout_attention(q, k, v, *words, backend=backend)


def sdpa(inputs: Inputs) -> Call:
    """Plain attention without modulation: the line to reach."""
    return scaled_dot_product_attention


def eager(inputs: Inputs) -> Call:
    """The modulation as DenseDiffusion's code does it: scores and masks in memory, half of the batch modulated."""
    dense_mask = _matched(inputs).to(inputs.q.dtype)[None]  # [1, M, N]
    strength = inputs.strength[-1, 0, :, None].to(inputs.q.dtype)  # [M, 1]
    return lambda q, k, v: official_attention(q, k, v, dense_mask, strength)


def sdpa_bias(inputs: Inputs) -> Call:
    """SDPA with an additive bias in memory, after a pass over the scores for their row extremes."""
    matched = _matched(inputs)
    temperature, strength = _temperature(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2)  # [B, H, M, N]
        gap = strength * (scores.amax(-1, keepdim=True) - scores.amin(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return scaled_dot_product_attention(q * temperature, k, v, attn_mask=(gap * matched).to(q.dtype))

    return call


def flex_naive(inputs: Inputs) -> Call:
    """FlexAttention in three passes: row maximum, row minimum, modulated attention."""
    flex, modulated = _flex(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return modulated(q, k, v, _row_max(flex, q, k) + _row_max(flex, -q, k))

    return call


def flex_smart(inputs: Inputs) -> Call:
    """FlexAttention in two passes: one for both extremes on q and -q stacked, then modulated attention."""
    flex, modulated = _flex(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        extremes = _row_max(flex, torch.cat((q, -q), 2), k)  # [B, H, 2*M]
        return modulated(q, k, v, extremes[..., : q.shape[2]] + extremes[..., q.shape[2] :])

    return call


CONTENDERS: dict[str, Callable[[Inputs], Call]] = {
    "dense_attn": dense_attn,
    "sdpa": sdpa,
    "eager": eager,
    "sdpa-bias": sdpa_bias,
    "flex-naive": flex_naive,
    "flex-smart": flex_smart,
}


def _matched(inputs: Inputs) -> Tensor:
    return (inputs.q_regions[:, None] & inputs.k_regions) != 0  # [M, N]


def _temperature(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """1 - c and c of softmax((1-c)*s + c*(max-min)*R), which is the modulated softmax, in q's dtype, [B, 1, M, 1]."""
    strength = inputs.strength[..., None].to(inputs.q.dtype)
    return 1 - strength, strength


def _flex(inputs: Inputs) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The compiled FlexAttention, and the modulated pass that follows when max - min is known."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # every workload is a shape of its own, and the compiler stops after a few of them
    flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    temperature, _ = _temperature(inputs)
    strength = inputs.strength
    q_regions, k_regions = inputs.q_regions, inputs.k_regions

    def modulated(q: Tensor, k: Tensor, v: Tensor, extent: Tensor) -> Tensor:
        gap = strength * extent  # [B, H, M]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + torch.where((q_regions[i] & k_regions[j]) != 0, gap[b, h, i], 0.0)

        return flex(q * temperature, k, v, score_mod=score_mod)

    return flex, modulated


def _row_max(flex: Callable[..., Tensor], q: Tensor, k: Tensor) -> Tensor:
    """Largest score of each row, float32 [B, H, M].

    Compiled for a CPU, FlexAttention hands out neither lse nor maximum, so a dummy v one column wide tells nothing:
    v is k, the softmax so hard that the output is the best key itself, and its product with q is the maximum.
    """
    best = flex(q, k, k, scale=_HARD * q.shape[-1] ** -0.5)
    return (q.float() * best.float()).sum(-1) * q.shape[-1] ** -0.5
