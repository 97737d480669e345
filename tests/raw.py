"""Raw calls of the registered ops, their arguments by name as the schema has them."""

from __future__ import annotations

import torch
from torch import Tensor

Arguments = dict[str, object]


def _op(direction: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.dense_attn, f"layout_attention_{direction}").default


def argument_names(direction: str) -> list[str]:
    """Names of the arguments of the forward ("fwd") or backward ("bwd") op."""
    return [argument.name for argument in _op(direction)._schema.arguments]


def select(direction: str, arguments: Arguments) -> tuple:
    """The op's arguments in its order."""
    return tuple(arguments[name] for name in argument_names(direction))


def call(direction: str, arguments: Arguments) -> tuple[Tensor, ...]:
    """The op on the arguments that it takes."""
    return _op(direction)(*select(direction, arguments))


def with_saved(arguments: Arguments, **grads: Tensor | None) -> Arguments:
    """The arguments of a forward call, its results by name, and the gradients: all that a backward call takes."""
    results = dict(zip((result.name for result in _op("fwd")._schema.returns), call("fwd", arguments)))
    return {**arguments, **results, **grads}
