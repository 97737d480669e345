"""Plans of calls of layout attention: their forms, and what follows from one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends import plans, table
from dense_attn._backends.contract import MODULATIONS
from dense_attn.layout_attention import inputs
from dense_attn.layout_attention.inputs import Order


class Plan(NamedTuple):
    """The consequences of a call's form."""

    scale: float  # that of a call without one
    rows: bool  # whether strength is as kernels take it
    backend: str  # "" with a k_mask, whose values are looked at
    tiled: bool  # whether that visits tiles


known: plans.Plans[Plan] = plans.Plans()


def form(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    k_regions: Tensor,
    q_order: Order,
    k_order: Order,
    strength: Tensor | float,
    lists: tuple[Tensor | None, ...] | None,
    words: tuple[object, ...],
) -> plans.Form | None:
    """The form of a call, which has all that the checks here look at but for numbers; None in a
    graph, which keeps nothing, and for what is no call of torch's own dense tensors.
    """
    if torch.compiler.is_compiling() or (lists is not None and lists.__class__ is not tuple):
        return None
    look, look_at = plans.look, plans.look_at
    try:
        tensors = look(q), look(k), look(v), look(q_regions), look(k_regions)
        strides = q.stride(), k.stride(), v.stride()
    except (AttributeError, RuntimeError):  # sparse ones have no strides
        return None
    orders = q_order if q_order is None else look_at(q_order), look_at(k_order)
    lists = lists if lists is None else tuple(map(look_at, lists))
    return tensors, strides, orders, look_at(strength), lists, words


def planned(
    form: plans.Form | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: tuple[Tensor | bool | None, ...],
    strength: Tensor | float,
    tile_lists: tuple[Tensor | None, ...] | None,
    modulation: str,
    backend: str,
    unmasked: bool,
) -> Plan:
    """The plan of a call that the checks let through, which is kept for those of its form."""
    inputs.check_tensors(q, k, v, *tokens)
    _checks.choice("modulation", modulation, MODULATIONS)
    if tile_lists is not None:
        inputs.check_lists(tile_lists, q, k)
    rows = isinstance(strength, Tensor) and inputs.row_strength(strength, q)[0] is strength
    name, tiled = "", False
    if unmasked:
        name = table.resolve(backend, "layout_attention", q, k.shape[2])
        tiled = table.NAMESPACES[name].tiled(q, k)
    plan = Plan(q.shape[3] ** -0.5, rows, name, tiled)
    return known.keep(form, plan, q, k, v, *tokens, strength, *(tile_lists or ()))
