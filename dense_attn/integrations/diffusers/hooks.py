"""Hooks around the calls of a module, outside of what torch.compile has compiled."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from weakref import WeakKeyDictionary

import torch

# packages whose code leaves tokens as they are
OWN = ("diffusers", "torch", "accelerate", "peft", "dense_attn")

_watchers: WeakKeyDictionary[torch.nn.Module, list[Any]] = WeakKeyDictionary()


def unwrapped(module: Any) -> Any:
    """A module without torch.compile around it."""
    return getattr(module, "_orig_mod", module)


def arguments(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> inspect.BoundArguments:
    """The arguments of a module's call by their names."""
    return _signature(type(unwrapped(module)).forward).bind(module, *args, **kwargs)


_signature = functools.cache(inspect.signature)


def watchers(module: Any) -> tuple[Any, ...]:
    """The blocks that watch a module now, outermost first."""
    return tuple(_watchers.get(unwrapped(module), ()))


def foreign(root: torch.nn.Module, name: str) -> str | None:
    """Another extension's function around a module of root, or elsewhere in root; None without one.

    Latents that are made smaller in one place are so in the layers behind it.
    """
    path = name.split(".")
    around = [root.get_submodule(".".join(path[:length])) for length in range(len(path), 0, -1)]
    for module in [*around, *root.modules()]:
        hooks = module._forward_pre_hooks, module._forward_hooks
        for call in [module.forward, *(call for own in hooks for call in own.values())]:
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
    """Inside the block, `before` changes the arguments of every call and `after` its output.

    Without `after`, `before` comes ahead of other hooks. Blocks of the same kind around this one
    are paused.
    """
    with ExitStack() as stack:
        blocks = _watchers.setdefault(unwrapped(module), [])
        for outer in blocks:
            if isinstance(outer, type(block)) or isinstance(block, type(outer)):
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
    """`before` and `after` for a module compiled in place, whose own hooks are compiled too."""
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


def registered_like(kind: type, made: type) -> type:
    """A class of attention processors, with the entry of another if diffusers has one of it.

    Guiders that skip layers look for it.
    """
    with suppress(ImportError, AttributeError, ValueError):  # diffusers of old has no registry
        from diffusers.hooks._helpers import AttentionProcessorRegistry as Registry

        Registry.register(made, Registry.get(kind))
    return made


def skips_scores(layer: Any) -> bool:
    """Whether a guider's hook takes a layer's values for its attention, as perturbed ones do."""
    registry = getattr(layer, "_diffusers_hook", None)
    hooks = () if registry is None else registry.hooks.values()
    return any(getattr(hook, "skip_attention_scores", False) for hook in hooks)
