"""A pipeline's own call, heard before it runs: what it was given, by name.

The `__call__` of its class is wrapped while a block is on, for all of the process: pipelines keep
their class, copies are not heard, and others of the class go on.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

Listener = Callable[[dict[str, Any]], None]


class _Wrapped(NamedTuple):
    """A class whose calls are heard."""

    before: Any  # its own `__call__`; None where it has that of another class
    now: Any
    blocks: list[Listener]  # that are on


_lock = threading.Lock()
_listeners: WeakKeyDictionary[Any, list[Listener]] = WeakKeyDictionary()  # of each pipeline
_wrapped: dict[type, _Wrapped] = {}


@contextmanager
def called(pipe: Any, tell: Listener) -> Iterator[None]:
    """`tell` gets the arguments of every call of the pipeline inside the block, before it.

    They have their defaults; those that a modular pipeline takes by name are beside the others.
    """
    kind = type(pipe)
    with _lock:
        if kind not in _wrapped:
            before, kind.__call__ = vars(kind).get("__call__"), _telling(kind.__call__)
            _wrapped[kind] = _Wrapped(before, kind.__call__, [])
        _wrapped[kind].blocks.append(tell)
        _listeners.setdefault(pipe, []).append(tell)
    try:
        yield
    finally:
        with _lock:
            _listeners[pipe].remove(tell)
            _wrapped[kind].blocks.remove(tell)
            if not _wrapped[kind].blocks:
                _unwrap(kind, *_wrapped.pop(kind)[:2])


def _unwrap(kind: type, before: Any, now: Any) -> None:
    """Put back a class's own call, but where others have wrapped it in the meantime."""
    if vars(kind).get("__call__") is not now:
        return
    if before is None:
        del kind.__call__
    else:
        kind.__call__ = before


def _telling(own: Callable[..., Any]) -> Callable[..., Any]:
    """A call that its pipeline's listeners are told of."""

    @functools.wraps(own)  # whose arguments are looked for
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        listeners = _listeners.get(self)
        if listeners:
            bound = inspect.signature(own).bind(self, *args, **kwargs)
            bound.apply_defaults()
            given = bound.arguments | bound.arguments.get("kwargs", {})
            for tell in tuple(listeners):
                tell(given)
        return own(self, *args, **kwargs)

    return __call__
