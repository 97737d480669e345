"""Masks as scaled_dot_product_attention takes them, made what `layout_attention` takes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dense_attn import _checks
from dense_attn.layout_attention import keys

RULE = "say which keys there are, for all queries and heads alike, while a layout is on"


class Mask(NamedTuple):
    """Keys that are there, or what is added to their scores, and the queries that this is for."""

    keys: Tensor  # bool or floats [B|1, N]
    queries: Tensor | None = None  # bool [B|1, M]; None: all, or those whose result none reads

    def attention(
        self,
        q: Tensor,  # [B, H, M, D]
        k: Tensor,  # [B, H / G, N, D]
        v: Tensor,  # [B, H / G, N, D]
        scale: float | None,
        run: Callable[..., Tensor],
    ) -> Tensor:
        """Attention [B, H, M, D], by a `run` of q, k, v, and of a scale and a k_mask by name.

        A sum that only some queries get is a product: columns of q that are 0 in the others.
        """
        if self.queries is None:
            return run(q, k, v, scale=scale, k_mask=self.keys)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        wide_q, wide_k, wide_v = keys.with_bias(q, k, v, self.keys.float(), scale)
        here = torch.ones_like(wide_q)
        here[..., q.shape[3] :] = self.queries[:, None, :, None]
        return keys.without_columns(run(wide_q * here, wide_k, wide_v, scale=scale), q)


def of_rows(options: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    """The options of some rows of the batch, which may have masks of their own."""
    mask = options.get("attn_mask")
    if mask is None or mask.dim() < 4 or len(mask) == 1:
        return options
    return options | {"attn_mask": mask[first:last]}


def of_call(
    options: dict[str, Any],
    first: int,
    last: int,
    q: Tensor,
    k: Tensor,
    same_tokens: bool,
    sources: tuple[Tensor, ...] = (),
) -> Mask | None:
    """The reduced mask of some rows, whose q and k these are; None without one.

    The layers of a call share a mask, or what each makes its own of: the tensor that it is a view
    of, or `sources`. It is looked at once, until these are changed in place.
    """
    given = options.get("attn_mask")
    if given is None:
        return None
    if torch.compiler.is_compiling():
        return reduced(of_rows(options, first, last)["attn_mask"], q, k, same_tokens)
    owner, *others = sources or (given._base if given._is_view() else given,)
    if any(x.is_inference() for x in (owner, *others)):
        return reduced(of_rows(options, first, last)["attn_mask"], q, k, same_tokens)
    rows = first, last, q.shape[:3], k.shape[2], same_tokens
    form = given.shape, given.dtype, None if sources else (given.stride(), given.storage_offset())
    at = rows, form, *(x._version for x in (owner, *others))
    kept = _reduced.get(owner)
    if kept is None or kept[0] != at or any(map(operator.is_not, kept[1], others)):
        mask = reduced(of_rows(options, first, last)["attn_mask"], q, k, same_tokens)
        # views would keep the mask that they are of
        mask = Mask(*(x.clone() if x is not None and x._is_view() else x for x in mask))
        _reduced[owner] = kept = at, others, mask
    return kept[2]


# the last mask of each owner, what it was made for, and what else it was made of
_reduced = WeakTensorKeyDictionary()


def reduced(mask: Tensor, q: Tensor, k: Tensor, same_tokens: bool = False) -> Mask:
    """A mask of q and k [B, H, tokens, D] without heads and, but for sums, without queries.

    Where queries and keys are the same tokens, queries whose key is removed are padding, and may
    see what they will.
    """
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape)
    shape = tuple(mask.shape)
    sizes = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    if any(size not in (1, full) for size, full in zip(shape, sizes)):
        _checks.refuse("attention_mask", RULE, f"one of shape {shape}")
    for axis in (1, 2):
        if mask.stride(axis) == 0:
            mask = mask.narrow(axis, 0, 1)
    first = mask[:, :1]
    if mask.shape[1] > 1:
        _require((mask == first).all(), shape)
    mask = first[:, 0]  # [B|1, M|1, N]
    if mask.dtype != torch.bool:
        mask = mask.masked_fill(mask <= keys.REMOVED, -torch.inf)
    if mask.shape[1] == 1:
        return Mask(_plain(mask[:, 0]))
    there = mask.any(1) if mask.dtype == torch.bool else mask.amax(1)
    same = (mask == there[:, None]).all(2)
    if mask.dtype == torch.bool or _known(there.isinf().any()):
        gone = ~there if mask.dtype == torch.bool else there.isinf()
        _require((same | gone).all() if same_tokens else same.all(), shape)
        return Mask(_plain(there))
    some = (mask != 0).any(2)  # queries that get a sum, be it below 0
    row = some.byte().argmax(1)[:, None, None]
    there = mask.gather(1, row.expand(-1, 1, mask.shape[2]))[:, 0]
    same = (mask == there[:, None]).all(2)
    _require((same | ~some).all() & ~there.isinf().any(), shape)
    return Mask(there, same)


def _plain(mask: Tensor) -> Tensor:
    """Floats that only remove keys as bool, where a look shows it."""
    if mask.dtype == torch.bool:
        return mask
    there = ~mask.isinf()
    return there if _known((there.logical_not() | (mask == 0)).all()) else mask


def _known(condition: Tensor) -> bool:
    """Whether it holds; a graph that is compiled does not look."""
    return not torch.compiler.is_compiling() and bool(condition)


def _require(condition: Tensor, shape: tuple[int, ...]) -> None:
    """Refuse a mask where a condition does not hold, in a compiled graph as it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(condition, f"attention_mask must {RULE}")
    elif not condition:
        _checks.refuse("attention_mask", RULE, f"one of shape {shape}")
