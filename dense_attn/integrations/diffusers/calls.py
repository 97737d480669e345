"""A pipeline's own call, heard before it runs: what it was given, by name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

Listener = Callable[[dict[str, Any]], None]
HEARD = "_dense_attn_heard"  # the mark of a class whose calls are heard

_listeners: WeakKeyDictionary[Any, list[Listener]] = WeakKeyDictionary()  # of each pipeline


@contextmanager
def called(pipe: Any, tell: Listener) -> Iterator[None]:
    """`tell` gets the arguments of every call of the pipeline inside the block, before it.

    They have their defaults; those that a modular pipeline takes by name are beside the others.
    """
    pipe.__class__ = _heard(_own(type(pipe)))
    listeners = _listeners.setdefault(pipe, [])
    listeners.append(tell)
    try:
        yield
    finally:
        listeners.remove(tell)
        if not listeners:
            del _listeners[pipe]
            pipe.__class__ = _own(type(pipe))


def _own(kind: type) -> type:
    """The class of a pipeline as it is without a block."""
    return kind.__mro__[1] if HEARD in vars(kind) else kind


@functools.cache
def _heard(kind: type) -> type:
    """A class of pipelines that tell their listeners of their calls; copies have none."""

    @functools.wraps(kind.__call__)  # whose arguments are looked for
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(kind.__call__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments | bound.arguments.get("kwargs", {})
        for tell in _listeners.get(self, ()):
            tell(given)
        return kind.__call__(self, *args, **kwargs)

    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, HEARD: True}
    return type(kind.__name__, (kind,), names | {"__call__": __call__, "__doc__": kind.__doc__})
