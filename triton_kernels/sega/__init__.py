"""Semantic guidance and percentile masks: one launch where a channel fits one program, several
where it does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

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


class Launch(NamedTuple):
    """One group of concepts."""

    part: slice | None  # of the concepts; None: all
    staged: tuple[int, ...] | None  # shape of what a row passes through, if it does
    options: dict[str, object]


class Plan(NamedTuple):
    """The consequences of a call's form: of shapes, dtypes and strides, not of numbers."""

    result: tuple[tuple[int, ...], tuple[int, ...]]  # shape and strides of eps and momentum
    thresholds: tuple[tuple[int, ...], tuple[int, ...]]  # theirs
    sizes: tuple[int, int]  # channels, and the values of each
    rows: tuple[tuple[int, ...] | None, ...]  # strides of what is launched; None: no mask
    whole: bool  # whether a channel fits one program
    grid: tuple[int]
    launches: tuple[Launch, ...]  # none where there are no values


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
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `reference.sega_guidance`; tensors with trailing axes that collapse to one."""
    if plan is None:
        inputs = eps_uncond, eps_text, eps_edits, momentum
        plan = sega_plan(*inputs, user_mask=user_mask, sum_channels=sum_channels)
    result, columns, sizes, strides, whole, grid, launches = plan
    new = eps_uncond.new_empty_strided  # takes less time than its kin
    eps, momentum_out = new(*result), new(*result, dtype=torch.float32)
    thresholds = new(*columns, dtype=torch.float32)
    if not launches:
        return eps, momentum_out, thresholds.zero_()  # of sums over no channels
    carry = momentum_out  # which one group of concepts does not touch
    if len(launches) > 1:
        carry = momentum_out.new_empty((2, *eps.shape))
    lists = (edit_guidance_scale, reverse, weights, partials, edit_threshold)
    groups = _groups(*map(tuple, lists), sizes[1])
    step = (guidance_scale, edit_momentum_scale, edit_mom_beta, 1 - edit_mom_beta)
    last = (step, all_warm, *sizes)
    for (part, staged, options), numbers in zip(launches, groups):
        edits, masks, levels = eps_edits, user_mask, thresholds
        if part is not None:
            edits, levels = edits[part], levels[part]
            masks = None if masks is None else masks[part]
        tensors = eps_uncond, eps_text, edits, momentum, masks, eps, momentum_out, carry, levels
        rows = [x if x is None else (x, *along) for x, along in zip(tensors, strides)]
        if whole:
            if staged is not None:
                staged = levels.new_empty(staged, dtype=torch.int32)
            sega_guidance_kernel[grid](*rows, staged, *numbers, *last, **options)
        else:
            _long(grid, levels, rows, numbers, last, options)
    return eps, momentum_out, thresholds


def _long(
    grid: tuple[int], thresholds: Tensor, rows: list, numbers: tuple, last: tuple, options: dict
) -> None:
    """One group of concepts whose rows are of any length."""
    scales, ranks, weights, partials = numbers
    if thresholds.numel() > 0:
        quantiles = (thresholds, rows[2], rows[0], scales, ranks, *last[2:])
        selection.long_thresholds(*quantiles, sum_channels=options["SUM_CHANNELS"])
    sega_combine_kernel[grid](*rows, scales, weights, partials, *last, **options)


def sega_plan(
    eps_uncond: Tensor,
    eps_text: Tensor,
    eps_edits: Tensor,
    momentum: Tensor,
    *,
    user_mask: Tensor | None,
    sum_channels: bool,
    **_numbers: object,
) -> Plan:
    """The plan of the calls of `sega_guidance` that have a form."""
    num_edits, (batch, channels) = eps_edits.shape[0], eps_uncond.shape[:2]
    columns = 1 if sum_channels else channels
    result, thresholds = map(_contiguous, (eps_uncond.shape, (num_edits, batch, columns)))
    if eps_uncond.numel() == 0:
        return Plan(result, thresholds, (channels, 0), (), True, (0,), ())
    num_values = eps_uncond.numel() // (batch * channels)
    own = (0, channels * num_values, num_values, 1)  # strides of what is contiguous
    carry = (batch * channels * num_values, *own[1:])
    uncond, text, nu = (_strides(x, 2) for x in (eps_uncond, eps_text, momentum))
    edits, masked = _strides(eps_edits, 3), None if user_mask is None else _strides(user_mask, 3)
    levels = (*thresholds[1][:2], 0 if sum_channels else 1)
    rows = (uncond, text, edits, nu, masked, own, own, carry, levels)
    # Addresses of values that are not neighbours take registers.
    apart = uncond[3] != 1 or edits[3] != 1
    found = [(None, *strides) for strides in rows[:5] if strides is not None]
    whole = selection.fits_one_program(LONGEST >> apart, num_values, *found)
    grid, options = (batch * channels,), _whole_row(num_values, sum_channels)
    if not whole:
        grid = (batch * channels * -(-num_values // TILE),)
        options = {"TILE": TILE, "num_warps": selection.warps(TILE), **EXACT}
    options |= {"SUM_CHANNELS": sum_channels, "GROUP": GROUP}
    held = UNSTAGED >> sum_channels >> apart if whole else None
    launches = tuple(_launches(num_edits, num_values, grid, held, options))
    return Plan(result, thresholds, (channels, num_values), rows, whole, grid, launches)


def _launches(
    num_edits: int, num_values: int, grid: tuple[int], held: int | None, options: dict[str, object]
) -> Iterator[Launch]:
    """The launch of each group of concepts; held: the values that registers hold of a whole row."""
    for first in range(0, max(num_edits, 1), GROUP):
        count = min(num_edits - first, GROUP)
        flags = {"FIRST": first == 0, "LAST": first + GROUP >= num_edits, "EDITS": count}
        staged = None
        if held is not None:
            together = max(1, min(next_power_of_2(count), held // options["BLOCK"]))
            flags["TOGETHER"] = together
            if num_values > held:
                staged = (*grid, together, num_values)
        part = slice(first, first + GROUP) if num_edits > GROUP else None
        yield Launch(part, staged, flags | options)


@lru_cache(maxsize=64)  # steps have their numbers in common
def _groups(
    scales: tuple[float, ...],
    reverse: tuple[bool, ...],
    weights: tuple[float, ...],
    partials: tuple[float, ...],
    levels: tuple[float, ...],
    num_values: int,
) -> list[tuple]:
    """The numbers of each launch's concepts: (scales, ranks, weights, partial weights)."""
    found = []
    scales = tuple(-s if negative else s for s, negative in zip(scales, reverse))
    for first in range(0, max(len(scales), 1), GROUP):
        part = slice(first, first + GROUP)
        ranks = selection.ranks_of(list(levels[part]), num_values)
        padded = (
            selection.group_of(tuple(numbers[part])) for numbers in (scales, weights, partials)
        )
        found.append((next(padded), ranks, *padded))
    return found


def _whole_row(num_values: int, sums: bool) -> dict[str, object]:
    block = max(16, next_power_of_2(num_values))
    # Each warp adds up all others' counts in every round, so few of them have many values each.
    warps = selection.warps(block, 16)
    # A short row is combined at once, but for sums, which spill 64 bytes on sm_80.
    tile = min(block, TILE if sums or block > 2 * TILE else 2 * TILE)
    return {"BLOCK": block, "TILE": tile, "num_warps": warps, **EXACT}


def _strides(x: Tensor, lead: int) -> tuple[int, int, int, int]:
    """The strides of x as [E, B, C, N], its axes after the first `lead` as one."""
    strides, last = x.stride(), 1
    for size, stride in zip(x.shape[lead:], strides[lead:]):
        if size > 1:
            last = stride
    return *[0] * (3 - lead), *strides[:lead], last


def _contiguous(shape: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and the strides of a contiguous tensor of it."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(shape), tuple(reversed(strides))
