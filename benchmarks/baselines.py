"""What a user would pick instead of `layout_attention`, each exact, each `prepare(inputs) -> call(q, k, v) -> out`.

What depends on the layout alone (masks, words, compilation) is prepared once and not timed. The modulation is `range`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from dense_attn import layout_attention
from dense_attn._step import official_attention

from . import machine
from .workloads import Inputs

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
_NARROW = 16  # columns of a v that FlexAttention takes at least
_DIGIT = 256
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
    dense_mask = matched(inputs).to(inputs.q.dtype)[None]  # [1, M, N]
    strength = inputs.strength[-1, 0, :, None].to(inputs.q.dtype)  # [M, 1]
    return lambda q, k, v: official_attention(q, k, v, dense_mask, strength)


def sdpa_bias(inputs: Inputs) -> Call:
    """SDPA with an additive bias in memory, after a pass over the scores for their row extremes."""
    biased = bias_after_statistics(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, bias = biased(q, k)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return call


def bias_after_statistics(inputs: Inputs, align: int = 1) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """From q and k the tempered q and the bias in memory, whose rows start at multiples of `align` elements."""
    inside = matched(inputs)
    temperature, strength = temperature_and_strength(inputs)

    def biased(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2)  # [B, H, M, N]
        gap = strength * (scores.amax(-1, keepdim=True) - scores.amin(-1, keepdim=True)) * q.shape[-1] ** -0.5
        num_keys = k.shape[2]
        room = functional.pad(inside, (0, -num_keys % align))
        return q * temperature, (gap * room).to(q.dtype)[..., :num_keys]

    return biased


def flex_naive(inputs: Inputs) -> Call:
    """FlexAttention in three passes: row maximum, row minimum, modulated attention."""
    flex, modulated = compiled_flex(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return modulated(q, k, v, _row_max(flex, q, k) + _row_max(flex, -q, k))

    return call


def flex_smart(inputs: Inputs) -> Call:
    """FlexAttention in two passes: one for both extremes on q and -q stacked, then modulated attention."""
    flex, modulated = compiled_flex(inputs)
    return lambda q, k, v: modulated(q, k, v, extent(flex, q, k))


def extent(flex: Callable[..., Tensor], q: Tensor, k: Tensor) -> Tensor:
    """Largest minus smallest score of each row in one pass on q and -q stacked, float32 [B, H, M]."""
    extremes = _row_max(flex, torch.cat((q, -q), 2), k)  # [B, H, 2*M]
    return extremes[..., : q.shape[2]] + extremes[..., q.shape[2] :]


CONTENDERS: dict[str, Callable[[Inputs], Call]] = {
    "dense_attn": dense_attn,
    "sdpa": sdpa,
    "eager": eager,
    "sdpa-bias": sdpa_bias,
    "flex-naive": flex_naive,
    "flex-smart": flex_smart,
}
PLAIN = ("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "flash-attn")  # without modulation: the line to reach


def matched(inputs: Inputs) -> Tensor:
    return (inputs.q_regions[:, None] & inputs.k_regions) != 0  # [M, N]


def temperature_and_strength(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """1 - c and c of softmax((1-c)*s + c*(max-min)*R), which is the modulated softmax, in q's dtype, [B, 1, M, 1]."""
    strength = inputs.strength[..., None].to(inputs.q.dtype)
    return 1 - strength, strength


def compiled_flex(inputs: Inputs) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The compiled FlexAttention, and the modulated pass that follows when max - min is known."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()  # every workload is a shape of its own, and the compiler stops after a few of them
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    flex = flex_attention if machine.current().dry_run else compiled  # a compilation takes longer than a dry run
    temperature, _ = temperature_and_strength(inputs)
    strength = inputs.strength
    q_regions, k_regions = inputs.q_regions, inputs.k_regions

    def modulated(q: Tensor, k: Tensor, v: Tensor, extent: Tensor) -> Tensor:
        gap = strength * extent  # [B, H, M]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + torch.where((q_regions[i] & k_regions[j]) != 0, gap[b, h, i], 0.0)

        return flex(q * temperature, k, v, score_mod=score_mod)

    return flex, modulated


def _row_max(flex: Callable[..., Tensor], q: Tensor, k: Tensor) -> Tensor:
    """Largest score of each row, float32 [B, H, M]: the softmax is so hard that only the best key counts.

    On a GPU its lse is the maximum, v being narrow and nothing. Compiled for a CPU, FlexAttention hands out neither lse
    nor maximum: v is k, the output the best key itself, and its product with q the maximum. So hard a softmax cannot be
    differentiated: with gradients, a narrow v tells the place of the best key.
    """
    scale = q.shape[-1] ** -0.5
    if not machine.on_gpu():
        best = flex(q, k, k, scale=_HARD * scale)
    elif not q.requires_grad:
        from torch.nn.attention.flex_attention import AuxRequest

        nothing = k.new_zeros(*k.shape[:3], _NARROW)
        return flex(q, k, nothing, scale=_HARD * scale, return_aux=AuxRequest(lse=True))[1].lse / _HARD
    else:
        best = k.gather(2, _best_place(flex, q.detach(), k.detach(), _HARD * scale).expand(*q.shape[:3], k.shape[3]))
    return (q.float() * best.float()).sum(-1) * scale


def _best_place(flex: Callable[..., Tensor], q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The place of each row's best key, int64 [B, H, M, 1]: two digits that every dtype holds, read by the softmax."""
    digits = k.new_zeros(*k.shape[:3], _NARROW)
    places = torch.arange(k.shape[2], device=k.device)
    digits[..., 0], digits[..., 1] = places // _DIGIT, places % _DIGIT
    read = flex(q, k, digits, scale=scale)[..., :2].round().long()
    return (read[..., :1] * _DIGIT + read[..., 1:]).clamp(max=k.shape[2] - 1)
