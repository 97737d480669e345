"""The forms of raw calls: all that their checks go by, and what a launch follows from."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from dense_attn._backends import plans
from dense_attn._backends.raw_checks.layout_attention import LARGEST


def fwd_form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    strength: Tensor | None,
    modulation: str,
    scale: float,
    q_order: Tensor | None,
    k_order: Tensor | None,
    tiles: Tensor | None,
    counts: Tensor | None,
    k_words: Tensor | None,
    every_strength: float = 1.0,
    with_lse: bool = True,
    with_stats: bool = True,
    seqlens_k: Tensor | None = None,
) -> plans.Form:
    """The form of a forward call: all that its checks go by but for what orders and counts say, and
    all that a launch follows from.
    """
    dense = plans.dense
    return (
        dense(q),
        dense(k),
        dense(v),
        dense(q_regions),
        dense(k_regions),
        q.stride(),
        k.stride(),
        v.stride(),
        q_regions.stride(),
        k_regions.stride(),
        plans.strided(strength, q_order, k_order, tiles, counts, k_words, seqlens_k),
        modulation,
        scale < 0,
        math.isfinite(scale) and abs(every_strength) <= LARGEST,
        with_lse,
        with_stats,
    )


def bwd_form(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    strength: Tensor | None,
    out: Tensor,
    stats: Tensor,
    modulation: str,
    scale: float,
    q_order: Tensor | None,
    k_order: Tensor | None,
    every_strength: float = 1.0,
    seqlens_k: Tensor | None = None,
) -> plans.Form:
    """The form of a backward call, as a forward call has one."""
    dense = plans.dense
    return (
        dense(grad_out),
        dense(q),
        dense(k),
        dense(v),
        dense(q_regions),
        dense(k_regions),
        dense(out),
        dense(stats),
        grad_out.stride(),
        q.stride(),
        k.stride(),
        v.stride(),
        q_regions.stride(),
        k_regions.stride(),
        out.stride(),
        stats.stride(),
        plans.strided(grad_lse, strength, q_order, k_order, seqlens_k),
        modulation,
        scale < 0,
        math.isfinite(scale) and abs(every_strength) <= LARGEST,
    )


def sega_form(
    eps_uncond: Tensor,
    eps_text: Tensor,
    eps_edits: Tensor,
    momentum: Tensor,
    *,
    guidance_scale: float,
    edit_guidance_scale: Sequence[float],
    edit_threshold: Sequence[float],
    weights: Sequence[float],
    partials: Sequence[float],
    all_warm: bool,
    reverse: Sequence[bool],
    edit_momentum_scale: float,
    edit_mom_beta: float,
    user_mask: Tensor | None,
    sum_channels: bool,
) -> plans.Form | None:
    """The form of a raw call, which has all that its check looks at but for levels; None where one
    of those is wrong.
    """
    for level in edit_threshold:
        if not 0 <= level <= 1:
            return None
    lengths = len(edit_guidance_scale), len(weights), len(partials), len(reverse)
    return (
        plans.dense(eps_uncond),
        plans.dense(eps_text),
        plans.dense(eps_edits),
        plans.dense(momentum),
        plans.strided(user_mask),
        eps_uncond.stride(),
        eps_text.stride(),
        eps_edits.stride(),
        momentum.stride(),
        len(edit_threshold),
        lengths,
        sum_channels,
    )
