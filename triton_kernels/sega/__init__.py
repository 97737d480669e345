"""Semantic guidance and percentile masks: one launch where a channel fits one program, several
where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from dense_attn.triton_kernels.parts import next_power_of_2
from dense_attn.triton_kernels.sega import selection
from dense_attn.triton_kernels.sega.combine import sega_combine_kernel, sega_guidance_kernel
from dense_attn.triton_kernels.sega.mask import mask_kernel, percentile_mask_kernel
from dense_attn.triton_kernels.sega.rows import GROUP
from dense_attn.triton_kernels.sega.selection import EXACT, LONGEST, TILE

# Differences that registers can make and hold; twice as many spill 80 bytes a thread.
UNSTAGED = 16384
# Bits of a dtype's values that are 0 in float32, whose search is shorter.
LOW_BITS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}


def percentile_mask(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """Launches `reference.percentile_mask`."""
    num_rows, num_values = x.shape
    masked = x.new_empty(x.shape)
    threshold = x.new_empty((num_rows,), dtype=torch.float32)
    if num_rows == 0:
        return masked, threshold
    rows = (x, 0, 0, *x.stride())
    if selection.fits_one_program(LONGEST, num_values, rows):
        options = {"LOW_BIT": LOW_BITS[x.dtype], **_whole_row(num_values, False)}
        rank = selection.rank(level, num_values)
        percentile_mask_kernel[(num_rows,)](rows, masked, threshold, num_values, rank, **options)
    else:
        ranks = selection.ranks_of([level], num_values)
        numbers = (selection.group_of(()), ranks, num_rows, num_values, LOW_BITS[x.dtype])
        selection.long_thresholds(threshold.view(1, 1, -1), rows, None, *numbers)
        grid = (num_rows * -(-num_values // TILE),)  # a second axis holds 65,535 programs
        mask_kernel[grid](
            rows, masked, threshold, num_values, TILE=TILE, num_warps=selection.warps(TILE), **EXACT
        )
    return masked, threshold


def sega_guidance(
    eps_uncond: Tensor,  # [B, C, ...]
    eps_text: Tensor,  # [B, C, ...]
    eps_edits: Tensor,  # [E, B, C, ...]
    momentum: Tensor,  # float32 [B, C, ...]
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
    user_mask: Tensor | None = None,  # float32 [E, B, C, ...]
    sum_channels: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `reference.sega_guidance`; tensors with trailing axes that collapse to one."""
    num_edits, (batch, channels) = eps_edits.shape[0], eps_uncond.shape[:2]
    eps = torch.empty_like(eps_uncond, memory_format=torch.contiguous_format)
    momentum_out = torch.empty_like(eps, dtype=torch.float32)
    columns = 1 if sum_channels else channels
    thresholds = eps.new_empty(num_edits, batch, columns, dtype=torch.float32)
    if eps.numel() == 0:
        return eps, momentum_out, thresholds.zero_()  # of sums over no channels

    num_values = eps.numel() // (batch * channels)
    carry = momentum_out  # which one group of concepts does not touch
    if num_edits > GROUP:
        carry = momentum_out.new_empty((2, *eps.shape))
    lists = (edit_guidance_scale, reverse, weights, partials, edit_threshold)
    groups = _groups(*map(tuple, lists), num_values)
    uncond, text, nu = _rows(eps_uncond, 2), _rows(eps_text, 2), _rows(momentum, 2)
    own = (channels * num_values, num_values, 1)  # strides of what is contiguous
    results = (eps, 0, *own), (momentum_out, 0, *own), (carry, batch * own[0], *own)
    step = (guidance_scale, edit_momentum_scale, edit_mom_beta, 1 - edit_mom_beta)
    for first in range(0, max(num_edits, 1), GROUP):
        edits, masks, levels = eps_edits, user_mask, thresholds
        if num_edits > GROUP:
            part = slice(first, first + GROUP)
            edits, levels = edits[part], levels[part]
            masks = None if masks is None else masks[part]
        flags = {
            "FIRST": first == 0,
            "LAST": first + GROUP >= num_edits,
            "SUM_CHANNELS": sum_channels,
            "GROUP": GROUP,
            "EDITS": min(num_edits - first, GROUP),
        }
        masked = None if masks is None else _rows(masks, 3)
        tensors = (uncond, text, _rows(edits, 3), nu, masked, *results)
        sizes = batch, channels, num_values
        _step(tensors, levels, groups[first // GROUP], step, all_warm, sizes, flags)
    return eps, momentum_out, thresholds


def _step(
    tensors: tuple,
    thresholds: Tensor,
    group: tuple,
    step: tuple[float, ...],
    all_warm: bool,
    sizes: tuple[int, int, int],
    flags: dict[str, object],
) -> None:
    """One group of concepts."""
    batch, channels, num_values = sizes
    scales, weights, partials, ranks = group
    sums = flags["SUM_CHANNELS"]
    # Addresses of values that are not neighbours take registers.
    apart = tensors[0][4] != 1 or tensors[2][4] != 1
    whole = selection.fits_one_program(LONGEST >> apart, num_values, *tensors)
    tensors = (*tensors, (thresholds, *thresholds.stride()[:2], 0 if sums else 1))
    last = (step, all_warm, channels, num_values)
    if whole:
        options = _whole_row(num_values, sums)
        held, edits = UNSTAGED >> sums >> apart, next_power_of_2(flags["EDITS"])
        together = max(1, min(edits, held // options["BLOCK"]))
        staged = None
        if num_values > held:
            shape = (batch * channels, together, num_values)
            staged = thresholds.new_empty(shape, dtype=torch.int32)
        options |= {"TOGETHER": together}
        sega_guidance_kernel[(batch * channels,)](
            *tensors, staged, scales, ranks, weights, partials, *last, **flags, **options
        )
        return
    if thresholds.numel() > 0:
        uncond, edits = tensors[0], tensors[2]
        selection.long_thresholds(
            thresholds, edits, uncond, scales, ranks, channels, num_values, 0, sums
        )
    grid = (batch * channels * -(-num_values // TILE),)
    options = {"TILE": TILE, "num_warps": selection.warps(TILE), **EXACT}
    sega_combine_kernel[grid](*tensors, scales, weights, partials, *last, **flags, **options)


@lru_cache(maxsize=64)  # steps have their numbers in common
def _groups(
    scales: tuple[float, ...],
    reverse: tuple[bool, ...],
    weights: tuple[float, ...],
    partials: tuple[float, ...],
    levels: tuple[float, ...],
    num_values: int,
) -> list[tuple]:
    """The numbers of each launch's concepts: (scales, weights, partial weights, ranks)."""
    found = []
    scales = tuple(-s if negative else s for s, negative in zip(scales, reverse))
    for first in range(0, max(len(scales), 1), GROUP):
        part = slice(first, first + GROUP)
        padded = (
            selection.group_of(tuple(numbers[part])) for numbers in (scales, weights, partials)
        )
        found.append((*padded, selection.ranks_of(list(levels[part]), num_values)))
    return found


def _whole_row(num_values: int, sums: bool) -> dict[str, object]:
    block = max(16, next_power_of_2(num_values))
    # Each warp adds up all others' counts in every round, so few of them have many values each.
    warps = selection.warps(block, 16)
    # A short row is combined at once, but for sums, which spill 64 bytes on sm_80.
    tile = min(block, TILE if sums or block > 2 * TILE else 2 * TILE)
    return {"BLOCK": block, "TILE": tile, "num_warps": warps, **EXACT}


def _rows(x: Tensor, lead: int) -> tuple[Tensor, int, int, int, int]:
    """(x, strides) of x as [E, B, C, N], its axes after the first `lead` as one."""
    return x, *_strides(x.shape, x.stride(), lead)


@lru_cache(maxsize=256)
def _strides(sizes: tuple[int, ...], strides: tuple[int, ...], lead: int) -> tuple[int, ...]:
    """The strides of [E, B, C, N]."""
    last = 1
    for size, stride in zip(sizes[lead:], strides[lead:]):
        if size > 1:
            last = stride
    return *[0] * (3 - lead), *strides[:lead], last
