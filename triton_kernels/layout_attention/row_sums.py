"""Sums over a row that the pass over query tiles takes: of its columns, and of its keys."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.layout_attention.extremes import LANES, by_lanes
from dense_attn.triton_kernels.primitives import load_numbers, load_part, scale_rows, sum_of


@triton.jit
def times_rows(
    acc,
    q,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Inner products of rows of acc, in parts, and of q."""
    x = load_part(q[0], q[1], q[2], q[3], 0, PART_0, HEAD_DIM)
    total = sum_of(acc[0] * x, q[3][:, None], True)
    if PART_1 > 0:
        x = load_part(q[0], q[1], q[2], q[3], PART_0, PART_1, HEAD_DIM)
        total += sum_of(acc[1] * x, q[3][:, None], True)
    return total


@triton.jit
def no_sums(ROWS: tl.constexpr, EXACT: tl.constexpr):
    """The sums of a row before the first key."""
    if EXACT:
        nothing = tl.zeros([ROWS], tl.float32)
        zero = (nothing, nothing)
        sums = zero, zero, zero, nothing, nothing
    else:
        sums = tl.zeros([ROWS, LANES], tl.float32)
    return sums


@triton.jit
def add_sums(
    sums,
    grad,
    weights,
    distance,
    meets,
    MODULATION: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A row's sums over keys, one tile further. Exactly: of matched keys' ds', of ds' times the
    distance to the key's extreme, of all ds', and of weights as of the first two. Else a lane's
    share of the first, which is the only one that dq does not tell.
    """
    if EXACT:
        grad_in, grad_distance, grad_all, weight_in, weight_distance = sums
        grad_in = _add(grad_in, tl.sum(tl.where(meets, grad, 0.0), 1))
        some = weights != 0
        grad_all = _add(grad_all, sum_of(grad, some, True))
        weight_in += tl.sum(tl.where(meets, weights, 0.0), 1)
        if MODULATION == "range":
            grad_distance = _add(grad_distance, sum_of(grad * distance, some, True))
            weight_distance += sum_of(weights * distance, some, True)
        sums = grad_in, grad_distance, grad_all, weight_in, weight_distance
    elif MODULATION != "mask":
        sums += tl.sum(by_lanes(tl.where(meets, grad, 0.0), ROWS, KEYS), 2)
    return sums


@triton.jit
def add_matched(sums, weights, slope, meets):
    """sums [rows, lanes] plus matched weights times their slopes [rows, lanes, keys of a lane], one
    after the other: each is one instruction under a condition.
    """
    KEYS: tl.constexpr = weights.shape[2]
    if KEYS == 1:
        weights, slope = tl.reshape(weights, sums.shape), tl.reshape(slope, sums.shape)
        more = tl.fma(weights, slope, sums)
        sums = tl.where(tl.reshape(meets, sums.shape), more, sums)
    else:
        halves: tl.constexpr = [sums.shape[0], sums.shape[1], KEYS // 2, 2]
        even, odd = tl.split(tl.reshape(weights, halves))
        even_slope, odd_slope = tl.split(tl.reshape(slope, halves))
        even_meets, odd_meets = tl.split(tl.reshape(meets, halves))
        sums = add_matched(sums, even, even_slope, even_meets)
        sums = add_matched(sums, odd, odd_slope, odd_meets)
    return sums


@triton.jit
def _add(total, x):
    """(total, what its last rounding took too much) + x. Many tiles of small weights would each be
    lost in a plain sum of a few large ones.
    """
    x -= total[1]
    larger = total[0] + x
    return larger, (larger - total[0]) - x


@triton.jit
def finished_sums(sums, through_lse, MODULATION: tl.constexpr, EXACT: tl.constexpr):
    """(sum of matched keys' ds', of ds' times the distances, what delta has missed) of rows: ds'
    sums to lse's gradient, and what is left of it exact sums are rid of.
    """
    grad_in = tl.zeros_like(through_lse)
    grad_distance, missed = grad_in, grad_in
    if EXACT:
        grad_in, grad_distance, grad_all, weight_in, weight_distance = sums
        missed = grad_all[0] - through_lse
        grad_in = grad_in[0] - missed * weight_in
        grad_distance = grad_distance[0] - missed * weight_distance
    elif MODULATION != "mask":
        grad_in = tl.sum(sums, 1)
    return grad_in, grad_distance, missed


@triton.jit
def lse_gradient(grad_lse, batch, head, tokens, exist, ROWS: tl.constexpr):
    """The gradient of rows' lse; 0 where there is none."""
    gradient = tl.zeros([ROWS], tl.float32)
    if grad_lse is not None:
        gradient = load_numbers(grad_lse, batch, head, tokens, exist)
    return gradient


@triton.jit
def of_some_keys(x, seqlens, seqlen_k):
    """Numbers of rows; 0 in a sample without keys, which has neither extremes nor an lse."""
    if seqlens is not None:
        x = tl.where(seqlen_k > 0, x, tl.zeros_like(x))
    return x


@triton.jit
def without_missed(acc, mean, missed, PART_1: tl.constexpr, KNOWN: tl.constexpr):
    """Sums of ds' times keys, in parts, rid of what delta has missed, which the mean key tells."""
    if KNOWN:
        mean = scale_rows(mean, missed, PART_1)
        acc = acc[0] - mean[0], acc[1] - mean[1]
    return acc


@triton.jit
def through_extremes(c, high, grads, sm_scale, MODULATION: tl.constexpr):
    """(dstrength, the gradient through the largest score, through the smallest) of rows."""
    grad_in, grad_distance, through_lse = grads
    nothing = tl.zeros_like(through_lse)
    grad_strength = grad_in if MODULATION == "bias" else nothing
    through_max, through_min = nothing, nothing
    if MODULATION == "max" or MODULATION == "range":
        grad_strength = sm_scale * high * grad_in
        through_max = c * grad_in
    if MODULATION == "range":
        grad_strength = sm_scale * grad_distance
        through_min = c * (through_lse - grad_in)
    return grad_strength, through_max, through_min
