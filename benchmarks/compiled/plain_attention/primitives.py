"""Jit helpers of plain attention.

PARTS is (head dim, columns of its first part, of its second), powers of two, 0 for no second. A
tensor is (pointer, strides of its first three axes in grains), its last axis contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
GRAIN = 8  # elements that every stride is a multiple of, which the compiler must know
_GRAIN = tl.constexpr(GRAIN)


@triton.jit
def place_of_program(num_heads, seqlen, BLOCK: tl.constexpr):
    """This program's head among all, its (sample, head), and its tile's first token and tokens."""
    tiles = tl.cdiv(seqlen, BLOCK)
    index = (tl.program_id(0) // tiles).to(tl.int64)
    first = (tl.program_id(0) % tiles) * BLOCK
    return index, (index // num_heads, index % num_heads), first, first + tl.arange(0, BLOCK)


@triton.jit
def _part_of(x, at, first, ROWS: tl.constexpr, FIRST: tl.constexpr, PART: tl.constexpr):
    """Pointers to columns FIRST ... FIRST + PART of rows from a first on, of the head at (sample,
    head); in a loop their base alone moves.
    """
    base = x[0] + (at[0] * x[1] + at[1] * x[2] + tl.cast(first, tl.int64) * x[3]) * _GRAIN
    rows, columns = tl.arange(0, ROWS), FIRST + tl.arange(0, PART)
    return base + (rows[:, None] * (x[3] * _GRAIN) + columns[None, :])


@triton.jit
def _exist(
    first,
    seqlen,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Which elements of a part exist."""
    mask = (first + tl.arange(0, ROWS) < seqlen)[:, None]
    if FIRST + PART > HEAD_DIM:
        mask = mask & (FIRST + tl.arange(0, PART) < HEAD_DIM)[None, :]
    return mask


@triton.jit
def _load_part(
    x,
    at,
    first,
    seqlen,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """One part of rows, 0 where there is none; unmasked, all of them exist."""
    pointers = _part_of(x, at, first, ROWS, FIRST, PART)
    if MASKED:
        rows = tl.load(pointers, mask=_exist(first, seqlen, ROWS, FIRST, PART, HEAD_DIM), other=0.0)
    elif FIRST + PART > HEAD_DIM:
        columns = (FIRST + tl.arange(0, PART) < HEAD_DIM)[None, :]
        rows = tl.load(pointers, mask=columns, other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def load(x, at, first, seqlen, ROWS: tl.constexpr, MASKED: tl.constexpr, PARTS: tl.constexpr):
    """Both parts of rows; without a second, the first twice."""
    one = _load_part(x, at, first, seqlen, ROWS, MASKED, 0, PARTS[1], PARTS[0])
    other = one
    if PARTS[2] > 0:
        other = _load_part(x, at, first, seqlen, ROWS, MASKED, PARTS[1], PARTS[2], PARTS[0])
    return one, other


@triton.jit
def store(x, at, first, seqlen, rows, ROWS: tl.constexpr, PARTS: tl.constexpr):
    """The inverse of `load`."""
    dtype: tl.constexpr = x[0].dtype.element_ty
    mask = _exist(first, seqlen, ROWS, 0, PARTS[1], PARTS[0])
    tl.store(_part_of(x, at, first, ROWS, 0, PARTS[1]), rows[0].to(dtype), mask=mask)
    if PARTS[2] > 0:
        mask = _exist(first, seqlen, ROWS, PARTS[1], PARTS[2], PARTS[0])
        pointers = _part_of(x, at, first, ROWS, PARTS[1], PARTS[2])
        tl.store(pointers, rows[1].to(dtype), mask=mask)


@triton.jit
def products(a, b, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """Inner products of rows in parts."""
    scores = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if PARTS[2] > 0:
        scores = tl.dot(a[1], tl.trans(b[1]), scores, input_precision=PRECISION)
    return scores


@triton.jit
def add_product(acc, weights, rows, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """The accumulator and weights @ rows, in parts."""
    weights = weights.to(rows[0].dtype)
    first = tl.dot(weights, rows[0], acc[0], input_precision=PRECISION)
    second = acc[1]
    if PARTS[2] > 0:
        second = tl.dot(weights, rows[1], second, input_precision=PRECISION)
    return first, second


@triton.jit
def scaled(rows, factor, PARTS: tl.constexpr):
    """Rows in parts times a factor each."""
    second = rows[1]
    if PARTS[2] > 0:
        second = second * factor[:, None]
    return rows[0] * factor[:, None], second


@triton.jit
def zeros(ROWS: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr):
    """An accumulator in parts."""
    first, second = tl.zeros([ROWS, PART_0], tl.float32), 0.0
    if PART_1 > 0:
        second = tl.zeros([ROWS, PART_1], tl.float32)
    return first, second
