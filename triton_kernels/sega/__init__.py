"""Semantic guidance and percentile masks: one launch where a channel fits one program, several
where it does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from dense_attn import _checks
from dense_attn.triton_kernels.sega import selection
from dense_attn.triton_kernels.sega.selection import (
    EXACT,
    GROUP,
    LONGEST,
    TILE,
    load_candidates,
    load_difference,
    load_magnitudes,
    load_row,
    number_of,
    quantile_of,
    rank_of,
    row_at,
)

UNSTAGED = (
    16384  # differences that registers can make and hold; twice as many spill 80 bytes a thread
)
LOW_BITS = {
    torch.float32: 0,
    torch.bfloat16: 16,
    torch.float16: 13,
}  # that are 0 in float32, whose search is shorter


@triton.jit
def store_row(tensor, e, b, c, offs, value, mask):
    """The inverse of `load_row`."""
    at = row_at(tensor, e, b, c, offs)
    tl.store(at, value.to(at.dtype.element_ty), mask=mask)


@triton.jit
def mask_tile(x, masked_ptr, threshold, row, num_values, start, BLOCK: tl.constexpr):
    """One tile of a row: x where |x| >= threshold, else 0."""
    offs = start + tl.arange(0, BLOCK)
    mask = offs < num_values
    value = tl.load(x[0] + row * x[3] + offs * x[4], mask=mask, other=0.0)
    kept = tl.abs(value.to(tl.float32)) >= threshold
    tl.store(masked_ptr + row * num_values + offs, tl.where(kept, value, 0.0), mask=mask)


@triton.jit
def percentile_mask_kernel(
    x, masked_ptr, thresholds_ptr, num_values, rank: tl.float64,
    LOW_BIT: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A whole row."""
    row = tl.program_id(0).to(tl.int64)
    candidates = load_candidates(x, None, 1.0, 0, 0, row, 1, num_values, None, False, BLOCK, TILE)
    threshold = quantile_of(candidates, num_values, tl.full((), rank, tl.float64), LOW_BIT)
    tl.store(thresholds_ptr + row, threshold)
    for start in range(0, num_values, TILE):
        mask_tile(x, masked_ptr, threshold, row, num_values, start, TILE)


@triton.jit
def mask_kernel(x, masked_ptr, thresholds_ptr, num_values, TILE: tl.constexpr):
    """One tile of a row whose threshold is known."""
    tiles = tl.cdiv(num_values, TILE)
    row, start = (
        (tl.program_id(0) // tiles).to(tl.int64),
        (tl.program_id(0) % tiles).to(tl.int64) * TILE,
    )
    mask_tile(x, masked_ptr, tl.load(thresholds_ptr + row), row, num_values, start, TILE)


@triton.jit
def combine_tile(
    uncond, text, edits, momentum, user_mask, eps, momentum_out, carry, thresholds, scales, weights, partials, step,
    all_warm, num_edits, num_channels, b, c, offs, mask,
    FIRST: tl.constexpr, LAST: tl.constexpr, SUM_CHANNELS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """eps and momentum of one tile once the thresholds [GROUP] are known; carry is what one group
    hands to the next.
    """
    guidance_scale, momentum_scale, beta, rest = step
    if FIRST:
        guided = load_row(uncond, 0, b, c, offs, mask)
        guided += guidance_scale * (load_row(text, 0, b, c, offs, mask) - guided)
        steer = momentum_scale * load_row(momentum, 0, b, c, offs, mask)
    else:
        guided = load_row(carry, 0, b, c, offs, mask)
        steer = load_row(carry, 1, b, c, offs, mask)

    for e in range(num_edits):
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
    uncond, text, edits, momentum, user_mask, eps, momentum_out, carry, thresholds, staged_ptr, scales, ranks, weights,
    partials, step, all_warm, num_edits, num_channels, num_values,
    FIRST: tl.constexpr, LAST: tl.constexpr, SUM_CHANNELS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """A whole channel: its thresholds, one concept after the other, then the step."""
    row = tl.program_id(0).to(tl.int64)
    b, c = row // num_channels, row % num_channels
    concepts = tl.arange(0, GROUP).to(tl.int64)
    found = tl.zeros((GROUP,), tl.float32)
    staged = None if staged_ptr is None else staged_ptr + row * num_values
    for e in range(num_edits):
        scale = number_of(scales, e, GROUP)
        candidates = load_candidates(
            edits,
            uncond,
            scale,
            e,
            b,
            c,
            num_channels,
            num_values,
            staged,
            SUM_CHANNELS,
            BLOCK,
            TILE,
        )
        threshold = quantile_of(candidates, num_values, rank_of(ranks, e, GROUP), 0)
        found = tl.where(concepts == e, threshold, found)
    at = thresholds[0] + concepts * thresholds[1] + b * thresholds[2] + c * thresholds[3]
    tl.store(at, found, mask=concepts < num_edits)  # every channel of a sum stores the same

    for start in range(0, num_values, TILE):
        offs = start + tl.arange(0, TILE)
        combine_tile(
            uncond, text, edits, momentum, user_mask, eps, momentum_out, carry, found, scales, weights, partials, step,
            all_warm, num_edits, num_channels, b, c, offs, offs < num_values, FIRST, LAST, SUM_CHANNELS, GROUP,
        )  # fmt: skip


@triton.jit
def sega_combine_kernel(
    uncond, text, edits, momentum, user_mask, eps, momentum_out, carry, thresholds, scales, weights, partials,
    step, all_warm, num_edits, num_channels, num_values,
    FIRST: tl.constexpr, LAST: tl.constexpr, SUM_CHANNELS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """One tile of a channel whose thresholds are known."""
    tiles = tl.cdiv(num_values, TILE)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    b, c = row // num_channels, row % num_channels
    concepts = tl.arange(0, GROUP).to(tl.int64)
    at = thresholds[0] + concepts * thresholds[1] + b * thresholds[2] + c * thresholds[3]
    found = tl.load(at, mask=concepts < num_edits, other=0.0)
    offs = (tl.program_id(0) % tiles).to(tl.int64) * TILE + tl.arange(0, TILE)
    combine_tile(
        uncond, text, edits, momentum, user_mask, eps, momentum_out, carry, found, scales, weights, partials, step,
        all_warm, num_edits, num_channels, b, c, offs, offs < num_values, FIRST, LAST, SUM_CHANNELS, GROUP,
    )  # fmt: skip


def percentile_mask(x: Tensor, level: float) -> tuple[Tensor, Tensor]:
    """As `reference.percentile_mask`."""
    _check_dtype("x", x)
    _check_level("level", level)
    if x.dim() != 2 or (x.shape[0] > 0 and x.shape[1] == 0):
        _refuse("x", "have 2 dimensions and values in each row", tuple(x.shape))
    num_rows, num_values = x.shape
    masked = x.new_empty(x.shape)
    threshold = x.new_empty((num_rows,), dtype=torch.float32)
    if num_rows == 0:
        return masked, threshold
    rows = (x, 0, 0, *x.stride())
    if selection.fits_one_program(LONGEST, num_values, rows):
        options = {"LOW_BIT": LOW_BITS[x.dtype], **_whole_row(num_values)}
        rank = selection.rank(level, num_values)
        percentile_mask_kernel[(num_rows,)](rows, masked, threshold, num_values, rank, **options)
    else:
        numbers = (
            selection.group_of(()),
            selection.ranks_of([level], num_values),
            num_rows,
            num_values,
        )
        selection.long_thresholds(threshold.view(1, 1, -1), rows, None, *numbers, LOW_BITS[x.dtype])
        grid = (num_rows * triton.cdiv(num_values, TILE),)  # a second axis holds 65,535 programs
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
    """As `reference.sega_guidance`; tensors with trailing axes that collapse to one."""
    lists = {
        "edit_guidance_scale": edit_guidance_scale,
        "edit_threshold": edit_threshold,
        "weights": weights,
        "partials": partials,
        "reverse": reverse,
    }
    _check_sega(eps_uncond, eps_text, eps_edits, momentum, user_mask, lists)
    num_edits, (batch, channels) = eps_edits.shape[0], eps_uncond.shape[:2]
    eps = eps_uncond.new_empty(eps_uncond.shape)
    momentum_out = eps_uncond.new_empty(eps_uncond.shape, dtype=torch.float32)
    thresholds = eps.new_empty(
        (num_edits, batch, 1 if sum_channels else channels), dtype=torch.float32
    )
    num_values = prod(eps.shape[2:])
    if eps.numel() == 0:
        if thresholds.numel() > 0:
            _refuse("eps_uncond", "have values in each channel", tuple(eps.shape))
        return eps, momentum_out, thresholds

    carry = (
        momentum_out.new_empty((2, *eps.shape))
        if num_edits > GROUP
        else momentum_out.new_empty((0, *eps.shape))
    )
    signed = [
        -scale if negative else scale for scale, negative in zip(edit_guidance_scale, reverse)
    ]
    whole = {"eps_uncond": eps_uncond, "eps_text": eps_text, "momentum": momentum}
    uncond, text, nu = (_view(name, x, 2) for name, x in whole.items())
    results = (
        _view("eps", eps, 2),
        _view("momentum_out", momentum_out, 2),
        _view("carry", carry, 3),
    )
    step = (guidance_scale, edit_momentum_scale, edit_mom_beta, 1 - edit_mom_beta)
    for first in range(0, max(num_edits, 1), GROUP):
        part = slice(first, first + GROUP)
        edits = _view("eps_edits", eps_edits[part], 3)
        masks = None if user_mask is None else _view("user_mask", user_mask[part], 3)
        flags = {
            "FIRST": first == 0,
            "LAST": first + GROUP >= num_edits,
            "SUM_CHANNELS": sum_channels,
            "GROUP": GROUP,
        }
        group = [selection.group_of(tuple(values[part])) for values in (signed, weights, partials)]
        group.append(selection.ranks_of(edit_threshold[part], num_values))
        tensors = (uncond, text, edits, nu, masks, *results)
        _step(
            tensors, thresholds[part], group, step, all_warm, (batch, channels, num_values), flags
        )
    return eps, momentum_out, thresholds


def _step(
    tensors: tuple, thresholds: Tensor, group: list[tuple], step: tuple[float, ...], all_warm: bool,
    sizes: tuple[int, int, int], flags: dict[str, object],
) -> None:  # fmt: skip
    """One group of concepts."""
    batch, channels, num_values = sizes
    scales, weights, partials, ranks = group
    sums = flags["SUM_CHANNELS"]
    apart = (
        tensors[0][4] != 1 or tensors[2][4] != 1
    )  # addresses of values that are not neighbours take registers
    whole = selection.fits_one_program(LONGEST >> apart, num_values, *tensors)
    tensors = (*tensors, (thresholds, *thresholds.stride()[:2], 0 if sums else 1))
    last = (step, all_warm, thresholds.shape[0], channels, num_values)
    if whole:
        options = _whole_row(num_values)
        staged = None
        if num_values > UNSTAGED >> sums >> apart:
            staged = thresholds.new_empty((batch * channels, num_values), dtype=torch.int32)
        sega_guidance_kernel[(batch * channels,)](
            *tensors, staged, scales, ranks, weights, partials, *last, **flags, **options
        )
        return
    if thresholds.numel() > 0:
        uncond, edits = tensors[0], tensors[2]
        selection.long_thresholds(
            thresholds, edits, uncond, scales, ranks, channels, num_values, 0, sums
        )
    grid = (batch * channels * triton.cdiv(num_values, TILE),)
    options = {"TILE": TILE, "num_warps": selection.warps(TILE), **EXACT}
    sega_combine_kernel[grid](*tensors, scales, weights, partials, *last, **flags, **options)


def _whole_row(num_values: int) -> dict[str, object]:
    block = max(16, triton.next_power_of_2(num_values))
    return {"BLOCK": block, "TILE": min(block, TILE), "num_warps": selection.warps(block), **EXACT}


def _view(name: str, x: Tensor, lead: int) -> tuple[Tensor, int, int, int, int]:
    """(x, strides) of x as [E, B, C, N], its axes after the first `lead` as one."""
    try:
        rows = x.view(*x.shape[:lead], prod(x.shape[lead:]))
    except RuntimeError:
        _refuse(name, "have trailing axes that collapse", f"strides {x.stride()}")
    return x, *[0] * (3 - lead), *rows.stride()


def _check_sega(
    eps_uncond: Tensor, eps_text: Tensor, eps_edits: Tensor, momentum: Tensor, user_mask: Tensor | None,
    lists: dict[str, Sequence],
) -> None:  # fmt: skip
    _check_dtype("eps_uncond", eps_uncond)
    if eps_uncond.dim() < 2:
        _refuse("eps_uncond", "have at least 2 dimensions", tuple(eps_uncond.shape))
    if eps_edits.dim() == 0:
        _refuse("eps_edits", "have a dimension of concepts", tuple(eps_edits.shape))
    one, each = tuple(eps_uncond.shape), (eps_edits.shape[0], *eps_uncond.shape)
    wanted = {
        "eps_text": (eps_text, one, eps_uncond.dtype),
        "eps_edits": (eps_edits, each, eps_uncond.dtype),
    }
    wanted |= {
        "momentum": (momentum, one, torch.float32),
        "user_mask": (user_mask, each, torch.float32),
    }
    for name, (value, shape, dtype) in wanted.items():
        if value is None:
            continue
        if tuple(value.shape) != shape:
            _refuse(name, f"have shape {shape}", tuple(value.shape))
        if value.dtype != dtype:
            _refuse(name, f"be {_checks.name(dtype)}", _checks.name(value.dtype))
        if value.device != eps_uncond.device:
            _refuse(name, f"be on eps_uncond's device {eps_uncond.device}", value.device)
    for name, values in lists.items():
        if len(values) != each[0]:
            _refuse(name, f"have {each[0]} entries", len(values))
    for level in lists["edit_threshold"]:
        _check_level("edit_threshold", level)


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in LOW_BITS:
        _refuse(name, f"be one of {', '.join(map(_checks.name, LOW_BITS))}", _checks.name(x.dtype))


def _check_level(name: str, level: float) -> None:
    if not 0 <= level <= 1:
        _refuse(name, "be from 0 to 1", level)


def _refuse(argument: str, rule: str, got: object) -> None:
    _checks.refuse(argument, rule, got, RuntimeError)
