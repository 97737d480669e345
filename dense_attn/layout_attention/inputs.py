"""The inputs of a call of layout attention: refused, or made what the raw ops take."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._dtypes import accumulation_dtype

Order = Tensor | bool | None  # a permutation, False for raster, None for what suits the kernel


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast, q, k and v in autocast's dtype, as scaled_dot_product_attention has them."""
    if not torch.compiler.is_compiling() and not torch._C._is_any_autocast_enabled():
        return q, k, v
    device = q.device.type if isinstance(q, Tensor) else "cpu"
    if device not in ("cpu", "cuda") and not _has_autocast(device):
        return q, k, v
    if not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if _is_cast(x) else x for x in (q, k, v))


def _has_autocast(device: str) -> bool:
    """torch 2.11 cannot trace the question: what it compiles for has autocast, but for meta."""
    if torch.compiler.is_compiling():
        return device != "meta"
    return torch.amp.is_autocast_available(device)


def _is_cast(x: object) -> bool:
    """Whether autocast has a dtype for x."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def check_tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    q_order: Order,
    k_order: Order,
) -> None:
    """Refuse tensors that do not go together."""
    _checks.attention_inputs(q, k, v)
    (batch, _, seqlen_q, _), seqlen_k = q.shape, k.shape[2]
    _checks.token_words("q_regions", q_regions, batch, seqlen_q, q)
    if k_regions is not q_regions or seqlen_q != seqlen_k:
        _checks.token_words("k_regions", k_regions, batch, seqlen_k, q)
    if q_order is None and k_order is None:
        return
    orders = [("q_order", q_order, seqlen_q)]
    if k_order is not q_order or seqlen_q != seqlen_k:
        orders.append(("k_order", k_order, seqlen_k))
    for name, order, tokens in orders:
        if isinstance(order, Tensor):
            _checks.token_words(name, order, batch, tokens, q)
        elif order is not None and order is not False:
            _checks.refuse(name, "be a tensor, False or None", type(order).__name__, TypeError)


def check_lists(lists: tuple[Tensor | None, ...], q: Tensor, k: Tensor) -> None:
    """Require three lists and two orders, as `tile_lists` returns them."""
    if not isinstance(lists, (tuple, list)) or len(lists) != 5:
        _checks.refuse("tile_lists", "be what tile_lists returns", type(lists).__name__, TypeError)
    tiles, counts, k_words, q_order, k_order = lists
    for x in (tiles, counts, k_words):
        _checks.tensor("tile_lists", x)
    if q_order is not None:
        _checks.token_words("tile_lists", q_order, q.shape[0], q.shape[2], q)
    if k_order is not None:
        _checks.token_words("tile_lists", k_order, q.shape[0], k.shape[2], q)


def visits(
    lists: tuple[Tensor | None, ...] | None, q_order: Order, k_order: Order
) -> tuple[Tensor | None, ...]:
    """The orders and the lists of a call, as the raw op has them; the orders are those of the lists
    where there are any.
    """
    if lists is None:
        orders = None if q_order is False else q_order, None if k_order is False else k_order
        return (*orders, None, None, None)
    tiles, counts, k_words, *own = lists
    if not q_order is k_order is None:
        for name, order, of_lists in zip(("q_order", "k_order"), (q_order, k_order), own):
            # Whether two permutations are the same is not known without a look at their values.
            if order is not None and (order is False) != (of_lists is None):
                got = "raster" if order is False else "an order"
                _checks.refuse(name, "be that of tile_lists, or None", got)
    return *own, tiles, counts, k_words


def row_strength(strength: Tensor | float, q: Tensor) -> tuple[Tensor | None, float]:
    """strength as a [B, H, M] view in the accumulation dtype, or None and a number that all rows
    have: no kernel is launched to spread it.
    """
    dtype = accumulation_dtype(q.dtype)
    batch, num_heads, seqlen_q, _ = q.shape
    if not isinstance(strength, Tensor):
        strength = _checks.number("strength", strength, dtype, "be a number or a tensor")
        return None, strength
    _checks.tensor("strength", strength)
    if strength.dtype not in (torch.float32, dtype):
        rule = "be float32" if dtype == torch.float32 else "be float32 or float64"
        _checks.refuse("strength", rule, _checks.name(strength.dtype), TypeError)
    _checks.same_device("strength", strength, q)
    shape = (batch, num_heads, seqlen_q)
    if strength.shape != shape:
        sizes = strength.shape
        if not (
            len(sizes) <= 3
            and (len(sizes) < 1 or sizes[-1] in (1, seqlen_q))
            and (len(sizes) < 2 or sizes[-2] in (1, num_heads))
            and (len(sizes) < 3 or sizes[-3] in (1, batch))
        ):
            rule = f"broadcast to [B, H, M] = {shape}"
            _checks.refuse("strength", rule, tuple(strength.shape))
        strength = strength.expand(batch, num_heads, seqlen_q)
    return strength if strength.dtype == dtype else strength.to(dtype), 1.0
