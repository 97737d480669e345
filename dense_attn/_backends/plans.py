"""Plans: what was found out about a call serves later ones that look the same to all that asked."""

from __future__ import annotations

from operator import attrgetter
from typing import Generic, TypeVar

import torch
from torch import Tensor

Plan = TypeVar("Plan")
Form = tuple[object, ...]
PLAIN = frozenset((Tensor, torch.nn.Parameter))
_MOST = 1024  # forms of an op: a model has a few at each of its resolutions
# What checks, and the choice of a backend, look at in a tensor beside its strides. Faster than a
# function of Python's by half.
look = attrgetter("__class__", "shape", "dtype", "device", "layout")
dense = attrgetter("shape", "dtype", "device")  # with strides all that kernels go by
_every_op: list[Plans] = []


class Plans(Generic[Plan]):
    """The plans of an op by the forms of calls that its checks have let through. A form has all
    that they go by, so what they refuse has another form than what is here.
    """

    def __init__(self) -> None:
        self._kept: dict[Form, Plan] = {}
        _every_op.append(self)

    def get(self, form: Form | None) -> Plan | None:
        """The plan of a form; None for one that is new, and for None."""
        if form is None:  # a graph must not look at the plans: it would be one for each of them
            return None
        try:
            return self._kept.get(form)
        except TypeError:  # a list in the place of a word, or a symbol in a shape
            return None

    def keep(self, form: Form | None, plan: Plan, *tensors: object) -> Plan:
        """Keep the plan of a call on torch's own tensors: what others say of themselves, or a trace
        has written down, is for once.
        """
        if form is None or torch._C._get_tracing_state():
            return plan
        if all(x.__class__ in PLAIN for x in tensors if isinstance(x, Tensor)):
            if len(self._kept) >= _MOST:
                self._kept.clear()
            self._kept[form] = plan
        return plan


def strided(*tensors: Tensor | None) -> Form:
    """The part of a raw call's form for tensors, and for those that are not there."""
    return tuple([x if x is None else (dense(x), x.stride()) for x in tensors])


def look_at(x: object) -> object:
    """The part of a form for a value that may be a tensor: 0 is not False, nor is 1 True."""
    if x.__class__ in PLAIN:
        return look(x)
    return x if x is None or x is False else x.__class__


def forget() -> None:
    """Forget every plan, where another backend may be chosen."""
    for plans in _every_op:
        plans._kept.clear()
