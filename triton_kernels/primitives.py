"""Jit helpers with two or more users.

A tensor travels as one tuple, (pointer, stride, stride, ...), strides in elements, the last axis
contiguous unless its stride is there too. That of a [B, H, tokens, ...] tensor ends in its grain, a
constant that its strides count in: the compiler must know that they are multiples of 8, or it loads
element by element. Rows of a head come in one part or two, as `parts.head_parts` says, each a power
of two: 80 = 64 + 16, the second padded to the 16 columns that a matrix instruction needs at least;
PART_1 = 0 says that there is one.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Bytes: most of the smallest cache, an A100's 40 MB.
IN_CACHE = tl.constexpr(32 << 20)


@triton.jit
def tile_of_program(num_heads, seqlen, BLOCK: tl.constexpr):
    """This program's tile of tokens: (head among all samples', tile, sample, head)."""
    tiles_per_head = tl.cdiv(seqlen, BLOCK)
    index = tl.program_id(0) // tiles_per_head
    tile = tl.program_id(0) % tiles_per_head
    batch, head = index // num_heads, index % num_heads  # quotients of int64 take long
    return index.to(tl.int64), tile, batch.to(tl.int64), head.to(tl.int64)


@triton.jit
def tile_in_turn(num_heads, seqlen_q, seqlen_k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile of queries, as `tile_of_program` says it: the first tile of every head,
    then the second, since tiles take unequal times and the longest come first.

    As many heads take turns as have keys and values of WIDTH bytes a token that a cache holds.
    """
    tiles_per_head = tl.cdiv(seqlen_q, BLOCK)
    heads = tl.num_programs(0) // tiles_per_head
    keys = tl.cast(seqlen_k, tl.int32)  # a size of 1 is no tensor
    groups = tl.cdiv(heads, tl.maximum(1, IN_CACHE // (2 * WIDTH) // keys))
    size = tl.cdiv(heads, groups)
    first = tl.program_id(0) // (size * tiles_per_head) * size
    place = tl.program_id(0) - first * tiles_per_head
    size = tl.minimum(size, heads - first)
    index = (first + place % size).to(tl.int64)
    return index, place // size, index // num_heads, index % num_heads


@triton.jit
def head_of(tensor, batch, head):
    """Pointer to the rows of one head of a [B, H, tokens, ...] tensor."""
    return tensor[0] + (batch * tensor[1] + head * tensor[2]) * tensor[4]


@triton.jit
def row_stride(tensor):
    """Elements from one row of a [B, H, tokens, ...] tensor to the next."""
    return tensor[3] * tensor[4]


@triton.jit
def tokens_at(first, order, batch, num_tokens, BLOCK: tl.constexpr):
    """The BLOCK tokens from place first on, int64, and which of them exist."""
    return tokens_of(first + tl.arange(0, BLOCK), order, batch, num_tokens)


@triton.jit
def tokens_of(places, order, batch, num_tokens):
    """The tokens in places, int64, and which of them exist; an order leads to no other memory."""
    exist = places < num_tokens
    tokens = places
    if order is not None:
        tokens = tl.load(order[0] + batch * order[1] + places * order[2], mask=exist, other=0)
        tokens = tl.minimum(tl.maximum(tokens, 0), num_tokens - 1)
    return tokens.to(tl.int64), exist


@triton.jit
def words_at(words, batch, tokens, exist):
    """Region words of tokens; 0 for those that do not exist."""
    return tl.load(words[0] + batch * words[1] + tokens * words[2], mask=exist, other=0)


@triton.jit
def meeting(a, b, one):
    """1 where words a [I, 1] and b [1, J] share a region, else 0. With `one` a number that the
    compiler does not know: from comparisons it makes masks of bits, which cost more than the sums.
    """
    shared = (a & b).to(tl.uint32, bitcast=True)
    return tl.minimum(shared, one.to(tl.uint32)).to(tl.int32)


@triton.jit
def plus_bits(x, gap, meets):
    """x where `meets` is 0; where it is 1, the float that its bits and `gap` add up to."""
    return (x.to(tl.int32, bitcast=True) + gap * meets).to(tl.float32, bitcast=True)


@triton.jit
def part_of(
    base, stride, tokens, exist, FIRST: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Pointers to columns FIRST ... FIRST + PART of rows, and which are there: [tokens, PART]."""
    columns = FIRST + tl.arange(0, PART)
    mask = exist[:, None]
    if FIRST + PART > HEAD_DIM:
        mask = mask & (columns < HEAD_DIM)[None, :]
    return base + tokens[:, None] * stride + columns[None, :], mask


@triton.jit
def load_part(
    base, stride, tokens, exist, FIRST: tl.constexpr, PART: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Columns FIRST ... FIRST + PART of rows, 0 where there is none."""
    at, mask = part_of(base, stride, tokens, exist, FIRST, PART, HEAD_DIM)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def store_part(
    base,
    stride,
    tokens,
    exist,
    part,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Columns FIRST ... FIRST + PART of rows, rounded to what the pointer points at."""
    at, mask = part_of(base, stride, tokens, exist, FIRST, PART, HEAD_DIM)
    tl.store(at, part.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(
    base, stride, tokens, exist, PART_0: tl.constexpr, PART_1: tl.constexpr, HEAD_DIM: tl.constexpr
):
    """Both parts of rows; the second is the first's twin when there is one part."""
    first = load_part(base, stride, tokens, exist, 0, PART_0, HEAD_DIM)
    second = first
    if PART_1 > 0:
        second = load_part(base, stride, tokens, exist, PART_0, PART_1, HEAD_DIM)
    return first, second


@triton.jit
def store_rows(
    base,
    stride,
    tokens,
    exist,
    rows,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Both parts of rows."""
    store_part(base, stride, tokens, exist, rows[0], 0, PART_0, HEAD_DIM)
    if PART_1 > 0:
        store_part(base, stride, tokens, exist, rows[1], PART_0, PART_1, HEAD_DIM)


@triton.jit
def load_head(
    x,
    batch,
    head,
    tokens,
    exist,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """Both parts of rows of one head of x [B, H, tokens, D]."""
    base, stride = head_of(x, batch, head), row_stride(x)
    return load_rows(base, stride, tokens, exist, PART_0, PART_1, HEAD_DIM)


@triton.jit
def store_head(
    x,
    batch,
    head,
    tokens,
    exist,
    rows,
    PART_0: tl.constexpr,
    PART_1: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """The inverse of `load_head`."""
    base, stride = head_of(x, batch, head), row_stride(x)
    store_rows(base, stride, tokens, exist, rows, PART_0, PART_1, HEAD_DIM)


@triton.jit
def load_numbers(x, batch, head, tokens, exist):
    """The numbers of rows of one head of x [B, H, tokens], 0 for those that do not exist; all are
    x[1] where x has no pointer.
    """
    if x[0] is None:
        numbers = tl.where(exist, tl.cast(x[1], tl.float32), 0.0)
    else:
        at = head_of(x, batch, head) + tokens * row_stride(x)
        numbers = tl.load(at, mask=exist, other=0.0)
    return numbers


@triton.jit
def products(a, b, PART_1: tl.constexpr, PRECISION: tl.constexpr):
    """Inner products of the rows of a [I, D] and of b [J, D], both in parts: [I, J]."""
    scores = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    if PART_1 > 0:
        scores = tl.dot(a[1], tl.trans(b[1]), scores, input_precision=PRECISION)
    return scores


@triton.jit
def add_product(acc, weights, rows, PART_1: tl.constexpr, PRECISION: tl.constexpr):
    """acc + weights [I, J] @ rows [J, D], in parts."""
    first, second = _add_product(acc[0], weights, rows[0], PRECISION), acc[1]
    if PART_1 > 0:
        second = _add_product(second, weights, rows[1], PRECISION)
    return first, second


@triton.jit
def _add_product(acc, weights, rows, PRECISION: tl.constexpr):
    """One part. In exact float32 a tile is summed by itself: one chain of all tokens, each sum
    rounded, would be several times less exact than PyTorch's.
    """
    if weights.dtype == tl.float32 and PRECISION == "ieee":
        # A plain addition would melt into the product.
        acc = tl.fma(tl.dot(weights, rows, input_precision=PRECISION), 1.0, acc)
    else:
        acc = tl.dot(weights, rows, acc, input_precision=PRECISION)
    return acc


@triton.jit
def sum_of(products, there, APART: tl.constexpr):
    """Each row's sum of products. Where a lane has one product of a row, it would fuse with the
    first exchange between lanes and leave them with sums that differ: a select keeps them apart.
    """
    return tl.sum(tl.where(there, products, 0.0) if APART else products, 1)


@triton.jit
def inner_products(a, b, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """Inner products of rows, both (pointer, stride, tokens, which exist), by a few columns."""
    total = tl.zeros_like(a[3]).to(tl.float32)
    for first in tl.static_range(0, HEAD_DIM, COLUMNS):
        x = load_part(a[0], a[1], a[2], a[3], first, COLUMNS, HEAD_DIM).to(tl.float32)
        y = load_part(b[0], b[1], b[2], b[3], first, COLUMNS, HEAD_DIM)
        total += sum_of(x * y, a[3][:, None], True)
    return total


@triton.jit
def zero_rows(ROWS: tl.constexpr, PART_0: tl.constexpr, PART_1: tl.constexpr):
    """An accumulator in parts."""
    first = tl.zeros([ROWS, PART_0], tl.float32)
    second = 0.0
    if PART_1 > 0:
        second = tl.zeros([ROWS, PART_1], tl.float32)
    return first, second


@triton.jit
def scale_rows(rows, factor, PART_1: tl.constexpr):
    """Rows in parts times one factor each."""
    first = rows[0] * factor[:, None]
    second = rows[1]
    if PART_1 > 0:
        second = second * factor[:, None]
    return first, second


@triton.jit
def finite_or_zero(x):
    """x, or 0 where it is infinite: exponents of a row without keys are measured from 0."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def anchor_of(row_max, row_min, factor, MODULATION: tl.constexpr):
    """The raw score that weighs most, from which exponents are measured; 0 for a row without
    any.
    """
    anchor = row_max
    if MODULATION == "range":
        anchor = tl.where(factor < 0, row_min, row_max)
    return finite_or_zero(anchor)


@triton.jit
def temperature(strength, MODULATION: tl.constexpr):
    """Factor of the scores: s' = temperature*s + (a term common to the keys of one population)."""
    factor = tl.zeros_like(strength) + 1.0
    if MODULATION == "range":
        factor = 1 - strength
    return factor


@triton.jit
def additions(strength, score_max, score_min, MODULATION: tl.constexpr):
    """The rule's additions to matched scores and to others: (matched, others, taken off both)."""
    matched = tl.zeros_like(strength)
    others, common = matched, matched
    if MODULATION == "range":
        matched, others = strength * score_max, strength * score_min
        alone = others == float("-inf")  # a minimum of -inf leaves the matched keys alone
        gap = strength * (score_max - score_min)  # rounded less than the difference of both terms
        common = tl.where(alone, matched, others)
        matched, others = tl.where(alone, matched - matched, gap), others - common
    elif MODULATION == "max":
        matched = strength * score_max
    elif MODULATION == "bias":
        matched = strength
    else:
        others = others + float("-inf")
    matched = tl.where(matched == float("inf"), float("nan"), matched)  # as exp(inf - inf) is
    return matched, others, common
