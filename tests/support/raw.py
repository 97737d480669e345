"""Raw calls of the registered ops, their arguments by name as the schema has them."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_attn._backends import cpu, ops

Arguments = dict[str, object]
library = "dense_attn"  # whose ops are called
FWD, BWD = "layout_attention_fwd", "layout_attention_bwd"


def registered() -> set[str]:
    """Names of the ops that the compiled library has kernels of."""
    return set() if cpu.LOAD_ERROR is not None else ops.OPS.keys() - cpu.NO_KERNELS


def _op(name: str) -> torch._ops.OpOverload:
    return getattr(getattr(torch.ops, library), name).default


def argument_names(op: str) -> list[str]:
    """Names of an op's arguments."""
    return [argument.name for argument in _op(op)._schema.arguments]


def select(op: str, arguments: Arguments) -> tuple[tuple, Arguments]:
    """The op's positional arguments in its order, and those it takes by keyword; what is not there
    has the schema's default.
    """
    schema = _op(op)._schema.arguments

    def value(argument: torch._C.Argument) -> object:
        if argument.name not in arguments and argument.has_default_value():
            return argument.default_value
        return arguments[argument.name]

    by_name = {argument.name: value(argument) for argument in schema if argument.kwarg_only}
    return tuple(value(argument) for argument in schema if not argument.kwarg_only), by_name


def call(op: str, arguments: Arguments) -> tuple[Tensor, ...] | Tensor:
    """The op on the arguments that it takes."""
    positional, by_name = select(op, arguments)
    return _op(op)(*positional, **by_name)


def with_saved(arguments: Arguments, **grads: Tensor | None) -> Arguments:
    """Layout attention's arguments, results and gradients by name: all that its backward takes."""
    results = dict(zip((result.name for result in _op(FWD)._schema.returns), call(FWD, arguments)))
    return {**arguments, **results, **grads}
