"""How an op runs: recorded for its gradient where one is asked for, bare elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._C import (
    _are_functorch_transforms_active,
    _dispatch_keys,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._functorch import unwrap_if_dead
from torch.autograd import _profiler_enabled, forward_ad

from dense_attn._backends import plans, table

# isinstance(x, Tensor) takes long to say no.
_PLAIN = plans.PLAIN | {type(None)}
_NO_TENSORS = frozenset((type(None), str, float, bool, int, list, tuple))


def run(function: type[torch.autograd.Function], *inputs: object) -> Any:
    """The results of an autograd.Function whose last input names the backend."""
    if not (torch.compiler.is_compiling() or torch.is_grad_enabled() or _in_a_transform()):
        return function.forward(*inputs)  # as a backward pass has it
    return run_as(function, is_recorded(*inputs), *inputs)


def is_recorded(*inputs: object) -> bool:
    """Whether a gradient may be asked of what is made of these; inside of transforms always."""
    if torch.compiler.is_compiling():  # which cannot trace what is quicker
        wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
        return torch.is_grad_enabled() and len(wanted) > 0
    if _in_a_transform():
        return True
    if torch.is_grad_enabled():
        for x in inputs:
            if x.__class__ not in _NO_TENSORS and isinstance(x, Tensor) and x.requires_grad:
                return True
    return False


def run_as(function: type[torch.autograd.Function], recorded: bool, *inputs: object) -> Any:
    """The results of an autograd.Function, which is left out where it can be: it costs more than a
    small call.

    Its last input names the backend. One that torch's own autograd differentiates never needs it.
    The compiler and functional transforms take the Function as it is; forward-mode differentiation
    is refused by it, where a bare kernel would answer with the derivative 0.
    """
    compiling = torch.compiler.is_compiling()
    if not (recorded or compiling) or table.NAMESPACES[inputs[-1]].AUTOGRAD:
        return function.forward(*inputs)
    if compiling:
        return function.apply(*_distinct(inputs))
    if _in_a_transform():
        return function.apply(*inputs)
    # Past what torch.autograd.Function does for the transforms that are not here, but for wrappers
    # that those of before have left.
    live = [
        unwrap_if_dead(x) if x.__class__ not in _NO_TENSORS and isinstance(x, Tensor) else x
        for x in inputs
    ]
    return _recorded(function)(*live[: function.num_tensors], live)


def kernel_of(
    backend: str, op: str, floats: tuple[Tensor | None, ...], ints: tuple[Tensor | None, ...]
) -> Callable:
    """A backend's raw op; what it calls, where no mode, transform, trace or profiler of torch's
    watches ops: the way through torch would take as long as all else of a small call.
    """
    kernels = table.NAMESPACES[backend]
    if backend != "triton" or (at_once := getattr(kernels, "EAGER", {}).get(op)) is None:
        return getattr(kernels, op)
    watched = (
        torch.compiler.is_compiling()
        or _in_a_transform()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _get_tracing_state()
        or _profiler_enabled()
    )
    return getattr(kernels, op) if watched or not _are_plain(floats, ints) else at_once


def _are_plain(floats: tuple[Tensor | None, ...], ints: tuple[Tensor | None, ...]) -> bool:
    """Whether torch would hand tensors to a kernel as they are: no subclass, no lazy minus, which
    int32 has not.
    """
    if not _PLAIN.issuperset(map(type, floats + ints)):
        return False
    keys = 0
    for x in floats:
        if x is not None:
            keys |= _dispatch_keys(x).raw_repr()
    return not keys & ~_plain_keys(floats[0].device)


@cache
def _plain_keys(device: torch.device) -> int:
    """The dispatch keys that every tensor of a device has, as bits."""
    with torch.inference_mode(False):
        empty = torch.empty(0, dtype=torch.float32, device=device)
    return _dispatch_keys(empty).raw_repr()


def _in_a_transform() -> bool:
    """Whether a functional transform or forward-mode differentiation is active."""
    return _are_functorch_transforms_active() or forward_ad._current_level >= 0


def _distinct(inputs: tuple[object, ...]) -> list[object]:
    """Inputs without a tensor twice, which torch.compile takes into no autograd.Function."""
    distinct: list[object] = []
    for x in inputs:
        again = isinstance(x, Tensor) and any(x is other for other in distinct)
        distinct.append(x.view_as(x) if again else x)
    return distinct


@cache
def _recorded(function: type[torch.autograd.Function]) -> Callable:
    """The `apply` of the Function with forward and setup_context in one, since torch binds the
    arguments of two, and with all inputs as one behind `num_tensors`, since it looks at each.

    Of the results it has as many as setup_context says, if it does: each costs the host too.
    """
    num = function.num_tensors

    def forward(ctx: Any, *inputs: Any) -> Any:
        inputs = inputs[num]
        output = function.forward(*inputs)
        count = function.setup_context(ctx, inputs, output)
        return output if count is None else output[:count]

    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return *function.backward(ctx, *grads)[:num], None

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    recorded = type(
        function.__name__, (torch.autograd.Function,), members | {"__doc__": function.__doc__}
    )
    return super(torch.autograd.Function, recorded).apply
