"""Hooks around the calls of a module, outside of what torch.compile has compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch

OWN = (
    "diffusers",
    "torch",
    "accelerate",
    "peft",
    "dense_attn",
)  # whose code leaves tokens as they are

_watchers: WeakKeyDictionary[torch.nn.Module, list[Any]] = WeakKeyDictionary()


def unwrapped(module: Any) -> Any:
    """A module without torch.compile around it."""
    return getattr(module, "_orig_mod", module)


def watchers(module: Any) -> tuple[Any, ...]:
    """The blocks that watch a module now, outermost first."""
    return tuple(_watchers.get(unwrapped(module), ()))


def foreign(root: torch.nn.Module, name: str) -> str | None:
    """The function of another extension around a module inside of another, or elsewhere there; None
    without one.
    """
    path = name.split(".")
    around = [root.get_submodule(".".join(path[:length])) for length in range(len(path), 0, -1)]
    for module in [
        *around,
        *root.modules(),
    ]:  # latents made smaller in one place are so in the layers behind it
        calls = [
            module.forward,
            *module._forward_pre_hooks.values(),
            *module._forward_hooks.values(),
        ]
        for call in calls:
            function = getattr(getattr(call, "func", call), "__func__", getattr(call, "func", call))
            if getattr(function, "__globals__", {}).get("__name__", "").split(".")[0] not in OWN:
                return getattr(function, "__qualname__", type(function).__qualname__)
    return None


@contextmanager
def watched(
    module: torch.nn.Module,
    block: Any,
    before: Callable[..., Any],
    after: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """`before` changes the arguments of every call, ahead of others if there is no `after`, its
    output.

    Blocks of the same kind around this one are paused.
    """
    with ExitStack() as stack:
        blocks = _watchers.setdefault(unwrapped(module), [])
        for outer in blocks:
            if type(outer) is type(block):
                outer.paused += 1
                stack.callback(_resume, outer)
        blocks.append(block)
        stack.callback(blocks.remove, block)
        if module._compiled_call_impl is None:
            stack.callback(
                module.register_forward_pre_hook(
                    before, with_kwargs=True, prepend=after is None
                ).remove
            )
            if after is not None:
                stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        else:
            stack.enter_context(_around_compiled(module, before, after))
        yield


def _resume(block: Any) -> None:
    block.paused -= 1


@contextmanager
def _around_compiled(
    module: torch.nn.Module, before: Callable[..., Any], after: Callable[..., Any] | None
) -> Iterator[None]:
    """The same for a module compiled in place, whose own hooks are compiled with the rest."""
    inner = module._compiled_call_impl
    calls = inner if isinstance(inner, _Watched) else _Watched(module, inner)
    calls.before.insert(0 if after is None else len(calls.before), before)
    calls.after += [] if after is None else [after]
    module._compiled_call_impl = calls
    try:
        yield
    finally:
        calls.before.remove(before)
        if after is not None:
            calls.after.remove(after)
        if not calls.before:
            module._compiled_call_impl = calls.compiled


class _Watched:
    """A compiled call with hooks around it."""

    def __init__(self, module: torch.nn.Module, compiled: Callable[..., Any]) -> None:
        self.module, self.compiled = module, compiled
        self.before: list[Callable[..., Any]] = []
        self.after: list[Callable[..., Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        for hook in self.before:
            changed = hook(self.module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        output = self.compiled(*args, **kwargs)
        for hook in self.after:
            changed = hook(self.module, args, kwargs, output)
            output = output if changed is None else changed
        return output
