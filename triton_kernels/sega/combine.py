"""A step of semantic guidance: a channel in one program, or a tile of a channel whose thresholds
are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.sega.rows import (
    load_candidates,
    load_difference,
    load_magnitudes,
    load_row,
    number_of,
    rank_of,
    store_row,
)
from dense_attn.triton_kernels.sega.selection import quantiles_of


@triton.jit
def combine_tile(
    tensors,
    thresholds,
    concepts,
    step,
    all_warm,
    num_channels,
    b,
    c,
    offs,
    mask,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    EDITS: tl.constexpr,
):
    """eps and momentum of one tile once the thresholds [GROUP] are known; carry is what one group
    hands to the next.
    """
    uncond, text, edits, momentum, user_mask, eps, momentum_out, carry = tensors
    scales, weights, partials = concepts
    guidance_scale, momentum_scale, beta, rest = step
    if FIRST:
        guided = load_row(uncond, 0, b, c, offs, mask)
        guided += guidance_scale * (load_row(text, 0, b, c, offs, mask) - guided)
        steer = momentum_scale * load_row(momentum, 0, b, c, offs, mask)
    else:
        guided = load_row(carry, 0, b, c, offs, mask)
        steer = load_row(carry, 1, b, c, offs, mask)

    # Unrolled, all concepts are loaded at once; sums over channels would take too many registers.
    UNROLLED: tl.constexpr = 1 if SUM_CHANNELS else max(EDITS, 1)
    for e in tl.range(0, EDITS, loop_unroll_factor=UNROLLED):
        scale, weight = number_of(scales, e, GROUP), number_of(weights, e, GROUP)
        partial = number_of(partials, e, GROUP)
        threshold = tl.sum(tl.where(tl.arange(0, GROUP) == e, thresholds, 0.0), axis=0)
        direction = load_difference(edits, uncond, scale, e, b, c, offs, mask)
        magnitudes = tl.abs(direction)
        if SUM_CHANNELS:
            magnitudes = load_magnitudes(
                edits, uncond, scale, e, b, c, num_channels, offs, mask, True
            )
        direction = tl.where(magnitudes >= threshold, direction, 0.0)
        if user_mask is not None:
            direction *= load_row(user_mask, e, b, c, offs, mask)
        steer = tl.where(weight != 0.0, steer + weight * direction, steer)
        guided = tl.where(partial != 0.0, guided + partial * direction, guided)

    if LAST:
        nu = beta * load_row(momentum, 0, b, c, offs, mask) + rest * steer
        store_row(momentum_out, 0, b, c, offs, nu, mask)
        store_row(eps, 0, b, c, offs, tl.where(all_warm, guided + steer, guided), mask)
    else:
        store_row(carry, 0, b, c, offs, guided, mask)
        store_row(carry, 1, b, c, offs, steer, mask)


@triton.jit
def sega_guidance_kernel(
    uncond,
    text,
    edits,
    momentum,
    user_mask,
    eps,
    momentum_out,
    carry,
    thresholds,
    staged_ptr,
    scales,
    ranks,
    weights,
    partials,
    step,
    all_warm,
    num_channels,
    num_values,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    EDITS: tl.constexpr,
    TOGETHER: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """A whole channel: its thresholds, one concept after the other, then the step."""
    row = tl.program_id(0).to(tl.int64)
    b, c = row // num_channels, row % num_channels
    concepts = tl.arange(0, GROUP).to(tl.int64)
    found = tl.zeros((GROUP,), tl.float32)
    for first in range(0, EDITS, TOGETHER):
        some = first + tl.arange(0, TOGETHER)
        there = (some < EDITS)[:, None]
        e = tl.minimum(some, EDITS - 1)
        staged = None
        if staged_ptr is not None:
            rows = row * TOGETHER + tl.arange(0, TOGETHER)
            staged = staged_ptr + rows[:, None] * num_values
        candidates = load_candidates(
            edits,
            uncond,
            number_of(scales, e, GROUP)[:, None],
            e[:, None],
            b,
            c,
            num_channels,
            num_values,
            staged,
            SUM_CHANNELS,
            BLOCK,
            TILE,
        )
        rank = rank_of(ranks, e, GROUP)
        quantiles = quantiles_of(candidates, there, num_values, rank, 0)
        own = some[:, None] == concepts[None, :]
        found += tl.sum(tl.where(own, quantiles[:, None], 0.0), axis=0)
    at = thresholds[0] + concepts * thresholds[1] + b * thresholds[2] + c * thresholds[3]
    tl.store(at, found, mask=concepts < EDITS)  # every channel of a sum stores the same

    tensors = (uncond, text, edits, momentum, user_mask, eps, momentum_out, carry)
    numbers = (scales, weights, partials)
    for start in range(0, num_values, TILE):
        offs = start + tl.arange(0, TILE)
        combine_tile(
            tensors,
            found,
            numbers,
            step,
            all_warm,
            num_channels,
            b,
            c,
            offs,
            offs < num_values,
            FIRST,
            LAST,
            SUM_CHANNELS,
            GROUP,
            EDITS,
        )


@triton.jit
def sega_combine_kernel(
    uncond,
    text,
    edits,
    momentum,
    user_mask,
    eps,
    momentum_out,
    carry,
    thresholds,
    scales,
    weights,
    partials,
    step,
    all_warm,
    num_channels,
    num_values,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    SUM_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr,
    EDITS: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of a channel whose thresholds are known."""
    tiles = tl.cdiv(num_values, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, c = row // num_channels, row % num_channels
    concepts = tl.arange(0, GROUP).to(tl.int64)
    at = thresholds[0] + concepts * thresholds[1] + b * thresholds[2] + c * thresholds[3]
    found = tl.load(at, mask=concepts < EDITS, other=0.0)
    offs = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    tensors = (uncond, text, edits, momentum, user_mask, eps, momentum_out, carry)
    numbers = (scales, weights, partials)
    combine_tile(
        tensors,
        found,
        numbers,
        step,
        all_warm,
        num_channels,
        b,
        c,
        offs,
        offs < num_values,
        FIRST,
        LAST,
        SUM_CHANNELS,
        GROUP,
        EDITS,
    )
