"""Which keys of a call are there: masks, made what the raw ops take, keys that are there first."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._dtypes import accumulation_dtype
from dense_attn.layout_attention.kept import Kept

REMOVED = -9984.0  # -1e4 in bfloat16: an additive mask's way to say that a key is not there
_STEP = 8  # columns, of which CUDA kernels take whole ones
_COLUMNS = {torch.float16: 2.0**15}  # the largest of q, by which k's hold a bias
_COLUMN = 2.0**100  # of the other dtypes, by which float32 holds a score of 2**27


@dataclass(frozen=True, eq=False)
class Keys:
    """The keys that count, per sample or for all: their places in front of the others', and how
    many they are.
    """

    order: Tensor | None  # int64 [B|1, N], None where they stand in front already
    counts: Tensor  # int32 [B|1]
    turned: Kept | None = None  # words and orders in their turn; None where none are kept

    def first(self, x: Tensor) -> Tensor:
        """[B, H, N, D] with the keys that count in front; views where they are there already."""
        if self.order is None:
            return x
        if self.order.shape[0] == 1:
            return x.index_select(2, self.order[0])
        return x.gather(2, self.order[:, None, :, None].expand(x.shape))

    def of_batch(self, batch: int) -> Tensor:
        """Their number in each sample, int32 [B]."""
        return self.counts if len(self.counts) == batch else self.counts.expand(batch)

    def words(self, words: Tensor) -> Tensor:
        """[N] or [B|1, N] in the same turn."""
        return words if self.order is None else self._once(words, self._words)

    def visits(self, k_order: Tensor | bool | None) -> Tensor | bool | None:
        """A caller's order of all keys as one of these, those that count in front in its turn."""
        return self._once(k_order, self._visits) if isinstance(k_order, Tensor) else k_order

    def _once(self, x: Tensor, turn: Callable[[Tensor], Tensor]) -> Tensor:
        """The turned x, which is kept where these keys are."""
        make = partial(turn, x)
        return make() if self.turned is None else self.turned.of(x, turn.__name__, make)

    def _words(self, words: Tensor) -> Tensor:
        samples = max(self.order.shape[0], words.shape[0] if words.dim() == 2 else 1)
        words = words.expand(samples, words.shape[-1])
        return words.gather(1, self.order.expand(words.shape))

    def _visits(self, k_order: Tensor) -> Tensor:
        samples = max(len(self.counts), k_order.shape[0] if k_order.dim() == 2 else 1)
        seqlen_k = k_order.shape[-1]
        places = k_order.expand(samples, seqlen_k).long().clamp(0, max(seqlen_k - 1, 0))
        if self.order is not None:
            places = self.order.argsort(-1).expand(places.shape).gather(1, places)
        late = places >= self.counts[:, None]
        return places.gather(1, late.byte().argsort(dim=-1, stable=True)).int()


class KeyMask(NamedTuple):
    """A `k_mask` as calls take it too; None where it is all keys, or adds nothing."""

    there: Keys | None  # the keys that count
    bias: Tensor | None  # [B|1, N], what is added to the scores of each


def of_mask(mask: Tensor | KeyMask | None, q: Tensor, k: Tensor) -> KeyMask:
    """Which keys count in a call, and what is added to their scores."""
    if mask is None:
        return KeyMask(None, None)
    if isinstance(mask, KeyMask):
        return mask
    mask = _checked(mask, q, k)
    if mask.dtype == torch.int32:
        return KeyMask(_counted(mask, k.shape[2]), None)
    if mask.dtype == torch.bool:
        return KeyMask(_keys(mask), None)
    there = ~(mask <= REMOVED)  # a NaN is there, and is seen
    bias = mask.to(accumulation_dtype(q.dtype)).masked_fill(~there, 0)
    if _seen(mask) and not mask.requires_grad and not bias.any():
        bias = None
    return KeyMask(_keys(there), bias)


_masks = Kept()


def kept(mask: Tensor, q: Tensor, k: Tensor) -> Tensor | KeyMask:
    """A `k_mask` as calls of these shapes take it, sorted once until it is changed in place."""
    if mask.requires_grad or mask.is_inference():
        return mask

    def make() -> KeyMask:
        there, bias = of_mask(mask, q, k)
        return KeyMask(None if there is None else replace(there, turned=Kept()), bias)

    return _masks.of(mask, (q.shape[:3], k.shape[2], q.dtype), make)


def with_bias(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v with columns whose product, times the scale, is what each key's scores get; in two
    terms, of which k's dtype holds the sum to twice its digits.
    """
    column = _column(scale, k.dtype)
    batch, num_heads, seqlen_k, head_dim = k.shape
    added = -(-(head_dim + 2) // _STEP) * _STEP - head_dim
    whole = (bias / (scale * column))[:, None, :, None]
    high = whole.to(k.dtype)
    columns = torch.cat((high, (whole - high).to(k.dtype)), -1)
    columns = torch.nn.functional.pad(columns, (0, added - 2))
    ones = q.new_full((1, 1, 1, 1), column).expand(*q.shape[:3], added)
    wide_k = torch.cat((k, columns.expand(batch, num_heads, seqlen_k, added)), -1)
    return torch.cat((q, ones), -1), wide_k, torch.nn.functional.pad(v, (0, added))


def _column(scale: float, dtype: torch.dtype) -> float:
    """The power of two whose product with the scale is 2 to 4, so that a bias by it is as large as
    the bias: float16 has no room for more.
    """
    if scale == 0:
        _checks.refuse("scale", "not be 0 with a k_mask that is added", scale)
    least = 2 / _COLUMNS.get(dtype, _COLUMN)
    if abs(scale) < least:
        rule = f"be {least:.2g} or more in size with a k_mask that is added"
        _checks.refuse("scale", rule, scale)
    return max(2.0 ** (2 - math.frexp(scale)[1]), torch.finfo(dtype).tiny)


def without_columns(out: Tensor, q: Tensor) -> Tensor:
    """The result of such a call in q's columns and memory order."""
    return torch.empty_like(q).copy_(out[..., : q.shape[3]])


def refuse_vmap() -> NoReturn:
    """Raise the error of a call inside vmap."""
    raise NotImplementedError(
        "layout_attention must be called outside of vmap, got a vmapped input: use the batch"
    )


def _checked(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Require int32 [B], or bool or floats of one row of keys for all or one a sample: [B|1, N]."""
    batch, num_heads, seqlen_q, _ = q.shape
    seqlen_k = k.shape[2]
    _checks.tensor("k_mask", mask)
    if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(mask):
        refuse_vmap()  # before a look at it
    _checks.same_device("k_mask", mask, q)
    if mask.dtype == torch.int32:
        if mask.shape != (batch,):
            rule = f"have shape [{batch}] where it counts the keys"
            _checks.refuse("k_mask", rule, tuple(mask.shape))
        return mask
    if mask.dtype != torch.bool and mask.dtype not in _checks.DTYPES:
        rule = f"be bool, int32 or one of {', '.join(map(_checks.name, _checks.DTYPES))}"
        _checks.refuse("k_mask", rule, _checks.name(mask.dtype), TypeError)
    shape = tuple(mask.shape)
    if mask.dim() == 4:  # as scaled_dot_product_attention has them
        for axis, tokens in ((1, num_heads), (2, seqlen_q)):
            if shape[axis] == tokens > 1 and mask.stride(axis) == 0:
                mask = mask.narrow(axis, 0, 1)
        if mask.shape[1:3] == (1, 1):
            mask = mask[:, 0, 0]
    if mask.dim() == 1:
        mask = mask[None]
    if mask.dim() != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] != seqlen_k:
        rule = f"have shape [{seqlen_k}], [1 or {batch}, {seqlen_k}] or that with 1, 1 between"
        _checks.refuse("k_mask", rule, shape)
    return mask


def _counted(counts: Tensor, seqlen_k: int) -> Keys:
    """The first keys of each sample."""
    if _seen(counts):
        wrong = counts[(counts < 0) | (counts > seqlen_k)]
        if wrong.numel() > 0:
            _checks.refuse("k_mask", f"count 0 to {seqlen_k} keys", int(wrong[0]))
    return Keys(None, counts.clamp(0, seqlen_k))


def _keys(there: Tensor) -> Keys | None:
    """The keys of a mask [B|1, N]; None where all are there, as far as that can be seen."""
    counts = there.sum(-1, dtype=torch.int32)
    if _seen(there):
        if there.all():
            return None
        place = torch.arange(there.shape[1], dtype=torch.int32, device=there.device)
        if torch.equal(there, place < counts[:, None]):
            return Keys(None, counts)
    return Keys((~there).byte().argsort(dim=-1, stable=True), counts)


def _seen(x: Tensor) -> bool:
    """Whether a look at values waits for no GPU and breaks no graph."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()
