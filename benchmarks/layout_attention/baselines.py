"""Alternatives to `layout_attention`, each exact, each `prepare(inputs) -> call(q, k, v) -> out`.

What depends on the layout alone (masks, words, compilation) is prepared once and not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

from dense_attn import layout_attention
from dense_attn.demo.step import official_attention

from ..harness import machine
from .workloads import Inputs

Call = Callable[[Tensor, Tensor, Tensor], Tensor]
_NARROW = 16  # columns of a v that FlexAttention takes at least
_DIGIT = 256
_HARD = 2.0**20  # softmax of the scores times this is 1 at the largest score and 0 elsewhere


def dense_attn(inputs: Inputs, backend: str = "auto") -> Call:
    """This library."""
    words = inputs.q_regions, inputs.k_regions, inputs.strength
    return lambda q, k, v: layout_attention(
        q, k, v, *words, modulation=inputs.modulation, backend=backend
    )


def sdpa(inputs: Inputs) -> Call:
    """Plain attention without modulation: the line to reach."""
    grouped = inputs.q.shape[1] != inputs.k.shape[1]
    if grouped:
        return partial(scaled_dot_product_attention, enable_gqa=True)
    return scaled_dot_product_attention


def eager(inputs: Inputs) -> Call:
    """DenseDiffusion's own way: scores and masks in memory, half of the batch modulated."""
    if inputs.modulation != "range":
        return _eager(inputs)
    dense_mask = matched(inputs).to(inputs.q.dtype)[None]  # [1, M, N]
    strength = inputs.strength[-1, 0, :, None].to(inputs.q.dtype)  # [M, 1]
    return lambda q, k, v: official_attention(q, k, v, dense_mask, strength)


def _eager(inputs: Inputs) -> Call:
    """Modulations other than DenseDiffusion's, by their formulas."""
    inside, (_, strength) = matched(inputs), temperature_and_strength(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5  # [B, H, M, N]
        if inputs.modulation == "mask":
            scores = scores.masked_fill(~inside, -torch.inf)
        else:
            gap = strength * (scores.amax(-1, keepdim=True) if inputs.modulation == "max" else 1)
            scores = scores + gap * inside
        return scores.softmax(-1) @ v

    return call


def sdpa_bias(inputs: Inputs) -> Call:
    """SDPA with a bias in memory, where needed after a pass over the scores for the extremes."""
    biased = bias_after_statistics(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, bias = biased(q, k)
        return scaled_dot_product_attention(q, k, v, attn_mask=bias)

    return call


def bias_after_statistics(
    inputs: Inputs, align: int = 1
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The way from q and k to the tempered q and the bias in memory, whose rows are aligned."""
    num_keys = inputs.k.shape[2]
    room = functional.pad(matched(inputs), (0, -num_keys % align))
    temperature, strength = temperature_and_strength(inputs)
    if inputs.modulation in ("bias", "mask"):  # the layout's alone
        fixed = strength * room
        if inputs.modulation == "mask":
            fixed = torch.zeros_like(strength).where(room, -torch.inf)
        fixed = fixed.to(inputs.q.dtype).expand(*inputs.q.shape[:2], -1, -1)[..., :num_keys]
        return lambda q, k: (q, fixed)

    def biased(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose(-1, -2)  # [B, H, M, N]
        extent = scores.amax(-1, keepdim=True)
        if inputs.modulation == "range":
            q, extent = q * temperature, extent - scores.amin(-1, keepdim=True)
        return q, (strength * extent * q.shape[-1] ** -0.5 * room).to(q.dtype)[..., :num_keys]

    return biased


def flex_naive(inputs: Inputs) -> Call:
    """FlexAttention in three passes: row maximum, row minimum, modulated attention."""
    flex, modulated = compiled_flex(inputs)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return modulated(q, k, v, _row_max(flex, q, k) + _row_max(flex, -q, k))

    return call


def flex_smart(inputs: Inputs) -> Call:
    """FlexAttention in two passes: both extremes on q and -q stacked, then modulated attention.

    The first pass of `max` has q alone; `bias` and `mask` need none.
    """
    flex, modulated = compiled_flex(inputs)
    if inputs.modulation == "max":
        return lambda q, k, v: modulated(q, k, v, _row_max(flex, q, k))
    if inputs.modulation in ("bias", "mask"):
        return lambda q, k, v: modulated(q, k, v, inputs.strength.new_ones(()))
    return lambda q, k, v: modulated(q, k, v, extent(flex, q, k))


def extent(flex: Callable[..., Tensor], q: Tensor, k: Tensor) -> Tensor:
    """Largest minus smallest score of each row, one pass on q and -q stacked: float32 [B, H, M]."""
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
# Other modulations have one way of FlexAttention, or no channels.
RANGE_ALONE = ("flex-naive", "flash-channels")
# Without modulation: the line to reach.
PLAIN = ("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flash-attn")


def matched(inputs: Inputs) -> Tensor:
    """Whether a query's regions have the key."""
    return (inputs.q_regions[:, None] & inputs.k_regions) != 0  # [M, N]


def temperature_and_strength(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """1 - c and c of the modulated softmax, softmax((1-c)*s + c*(max-min)*R): [B, 1, M, 1]."""
    strength = inputs.strength[..., None].to(inputs.q.dtype)
    return 1 - strength, strength


def compiled_flex(inputs: Inputs) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The compiled FlexAttention, and the modulated pass that follows when max - min is known."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # Every workload is a shape of its own, and the compiler stops after a few of them.
    torch.compiler.reset()
    flex = flex_attention
    if not machine.current().dry_run:  # which takes less time than a compilation
        flex = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    temperature = temperature_and_strength(inputs)[0] if inputs.modulation == "range" else 1
    strength, heads = inputs.strength, inputs.q.shape[1]
    q_regions, k_regions = inputs.q_regions, inputs.k_regions

    def meet(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (q_regions[i] & k_regions[j]) != 0

    if inputs.modulation == "mask":
        sizes = None, None, len(q_regions), len(k_regions)
        blocks = create_block_mask(meet, *sizes, q_regions.device)
        return flex, lambda q, k, v, extent: flex(q, k, v, block_mask=blocks)

    def modulated(q: Tensor, k: Tensor, v: Tensor, extent: Tensor) -> Tensor:
        gap = (strength * extent).expand(-1, heads, -1)  # [B, H, M]

        def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + torch.where(meet(b, h, i, j), gap[b, h, i], 0.0)

        return flex(q * temperature, k, v, score_mod=score_mod)

    return flex, modulated


def _row_max(flex: Callable[..., Tensor], q: Tensor, k: Tensor) -> Tensor:
    """Largest score of each row, float32 [B, H, M], by a softmax so hard that the best key counts.

    On a GPU its lse is the maximum, v being narrow and nothing. Compiled for a CPU, FlexAttention
    hands out neither lse nor maximum: v is k, the output the best key itself, and its product with
    q the maximum. So hard a softmax cannot be differentiated: with gradients, a narrow v tells the
    place of the best key.
    """
    scale = q.shape[-1] ** -0.5
    if not machine.on_gpu():
        best = flex(q, k, k, scale=_HARD * scale)
    elif not q.requires_grad:
        from torch.nn.attention.flex_attention import AuxRequest

        nothing = k.new_zeros(*k.shape[:3], _NARROW)
        lse = AuxRequest(lse=True)
        return flex(q, k, nothing, scale=_HARD * scale, return_aux=lse)[1].lse / _HARD
    else:
        place = _best_place(flex, q.detach(), k.detach(), _HARD * scale)
        best = k.gather(2, place.expand(*q.shape[:3], k.shape[3]))
    return (q.float() * best.float()).sum(-1) * scale


def _best_place(flex: Callable[..., Tensor], q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The place of each row's best key, int64 [B, H, M, 1], in digits that every dtype holds."""
    digits = k.new_zeros(*k.shape[:3], _NARROW)
    places = torch.arange(k.shape[2], device=k.device)
    digits[..., 0], digits[..., 1] = places // _DIGIT, places % _DIGIT
    read = flex(q, k, digits, scale=scale)[..., :2].round().long()
    return (read[..., :1] * _DIGIT + read[..., 1:]).clamp(max=k.shape[2] - 1)
