"""The network between the links of a chain: what it is called under, and what it must return."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from dense_attn import _checks
from dense_attn.reversible import grid
from dense_attn.reversible.pairs import ExactPair, FloatPair
from dense_attn.reversible.plan import Plan
from dense_attn.reversible.strides import dense_strides, laid_out

Method = TypeVar("Method", bound=Callable)


def eager(method: Method) -> Method:
    """The method, opaque to torch.compile: both directions must call the very same network."""

    @wraps(method)
    def opaque(*arguments: object, **named: object) -> object:
        if "torch._dynamo" not in sys.modules:  # which takes a second to import
            return method(*arguments, **named)
        return torch.compiler.disable(method)(*arguments, **named)

    return opaque


def refuse_transforms(x: Tensor, y: Tensor | None) -> None:
    """Refuse the derivatives that a chain would lose without a word."""
    if torch._C._are_functorch_transforms_active():  # what autograd.Function itself asks
        rule = "be called outside of torch.func's transforms"
        _checks.refuse("ReversibleSampler", rule, "a call inside one", NotImplementedError)
    _no_tangent("x", x)
    if isinstance(y, Tensor):
        _no_tangent("y", y)


def _no_tangent(argument: str, value: Tensor) -> None:
    if forward_ad._current_level < 0:
        return
    with forward_ad._set_fwd_grad_enabled(True):
        if forward_ad.unpack_dual(value).tangent is None:
            return
    rule = "have no tangent, a chain is differentiated backwards alone"
    _checks.refuse(argument, rule, "a dual tensor", NotImplementedError)


def _autocast(kind: str) -> tuple[torch.dtype, bool, bool]:
    """The state of autocast on a kind of device, as torch.autocast takes it."""
    return (
        torch.get_autocast_dtype(kind),
        torch.is_autocast_enabled(kind),
        torch.is_autocast_cache_enabled(),
    )


class Network:
    """eps_fn, its results checked, called under the autocast of the place where this was made."""

    def __init__(self, plan: Plan, like: Tensor) -> None:
        self.plan, self.strides = plan, dense_strides(like)
        kinds = {like.device.type, "cpu"}
        self.autocast = {
            kind: _autocast(kind) for kind in kinds if torch.amp.is_autocast_available(kind)
        }

    def __call__(self, fed: Tensor, step: int) -> Tensor:
        """The network's estimate at a step of the chain."""
        memory = self.plan.memory
        with memory:
            own = fed.clone()  # which it may write to
        eps = self._estimate(own, self.plan.timesteps[step])
        _checks.floats("eps_fn's result", eps)
        _checks.shaped_like("eps_fn's result", eps, memory, "x")
        with memory:
            return laid_out(eps, self.strides)

    def _estimate(self, own: Tensor, timestep: object) -> Tensor:
        moved = [kind for kind, state in self.autocast.items() if state != _autocast(kind)]
        if not moved and forward_ad._current_level < 0:
            return self.plan.eps_fn(own, timestep)
        with ExitStack() as stack:
            for kind in moved:
                stack.enter_context(torch.autocast(kind, *self.autocast[kind]))
            if forward_ad._current_level >= 0:  # an autograd.Function hides tangents from it
                stack.enter_context(forward_ad._set_fwd_grad_enabled(True))
            return self.plan.eps_fn(own, timestep)

    def repeated(self, fed: Tensor, step: int) -> Tensor:
        """The result of two calls, refused where they differ."""
        first, again = self(fed, step).clone(), self(fed, step)
        if not torch.equal(first, again) and first.isfinite().all() and again.isfinite().all():
            apart = (first.double() - again.double()).abs().max().item()
            got = f"two results that differ by {apart:.3g}"
            _checks.refuse("eps_fn", "be deterministic for exact inversion", got)
        return first

    def update(self, pair: FloatPair | ExactPair, eps: Tensor, step: int) -> None:
        """pair.update(eps), an overflow of the grid named by its step."""
        _no_tangent("eps_fn's result", eps)
        with self.plan.memory:
            try:
                pair.update(eps)
            except grid.OffGridError as error:
                grid.refuse_eps(pair.chain, error, step, self.plan.timesteps[step])
