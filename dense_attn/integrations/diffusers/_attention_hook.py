"""The softmax of a pipeline's attention layers, exchanged where q, k and v are ready for it.

diffusers' processors reach it by an entry of the registry behind `dispatch_attention_fn`, or by
`F.scaled_dot_product_attention` of their module. Both are wrapped while a block is on, for all of
the process. A mark around a layer's processor says whose call it is, in this thread; others go on.
"""

from __future__ import annotations

import functools
import inspect
import threading
import types
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention import masks

from .hooks import registered_like, skips_scores

MARKS = "_dense_attn_marks"  # the attribute of a layer that holds its marks
POINTS = "dispatch_attention_fn", "F.scaled_dot_product_attention"
# processors whose softmax is not seen, and those that have the same result
STAND_INS = {
    "AttnProcessor": "AttnProcessor2_0",
    "SlicedAttnProcessor": "AttnProcessor2_0",
    "XFormersAttnProcessor": "AttnProcessor2_0",
    "XFormersJointAttnProcessor": "JointAttnProcessor2_0",
}
OF_SDPA = ("attn_mask", "dropout_p", "is_causal")  # its options by place
UNTAKEN = ("is_causal", "dropout_p", "return_lse", "_parallel_config")


class Expected(NamedTuple):
    """The softmax of a layer that is meant, and the rows of its batch that are modulated."""

    first: int
    last: int
    num_queries: int
    num_keys: int
    same_tokens: bool = False  # whether queries and keys are
    sources: tuple[Tensor, ...] = ()  # that each layer makes its mask of, where known


class Mark(Protocol):
    """One block's interest in one layer."""

    def expected(self) -> Expected | None:
        """The softmax that this call is to exchange; None where it goes on as it is."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: masks.Mask | None
    ) -> Tensor:
        """The modulated rows' attention of q, k, v [B, H, N, D] as [B, H, M, D]."""

    def missed(self, seen: list[tuple[int, int]]) -> None:
        """Take note of a call without the softmax; `seen`: queries and keys of those it had."""


class _Call:
    """A call of a marked layer: its first softmax of the sizes that are meant is exchanged."""

    def __init__(self, mark: Mark, expected: Expected) -> None:
        self.mark, self.expected = mark, expected
        self.done = False
        self.seen: list[tuple[int, int]] = []

    def takes(self, q: Tensor, k: Tensor, tokens: int) -> bool:
        """Whether q and k are those that are meant; `tokens`: the dimension of theirs."""
        sizes = q.shape[tokens], k.shape[tokens]
        fits = sizes == self.expected[2:4] and q.shape[0] >= self.expected.last
        if fits and not self.done:
            self.done = True
            return True
        self.seen.append(sizes)
        return False

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any], plain: Callable[..., Tensor]
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D], modulated in the rows meant; `plain` has others."""
        for name in filter(options.get, UNTAKEN):
            _checks.refuse("pipe", f"attend without {name} while a layout is on", options[name])
        first, last, _, _, *tokens = self.expected
        end = q.shape[0]
        if last - first < end:
            q, k, v = q[first:last], k[first:last], v[first:last]
        mask = masks.of_call(options, first, last, q, k, *tokens)
        parts = [self.mark.attend(q, k, v, options.get("scale"), mask)]
        if last - first == end:
            return parts[0]
        parts = [plain(0, first), *parts] if first else parts
        parts += [plain(last, end)] if last < end else []
        # heads beside each other in memory, which is how processors read them next
        return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)


class _Thread(threading.local):
    call: _Call | None = None


class _Trace:
    def __init__(self) -> None:
        self.call: _Call | None = None


_thread, _trace = _Thread(), _Trace()


def _slot() -> _Thread | _Trace:
    """The place of the call at hand: torch.compile follows nothing that a thread has alone."""
    return _trace if torch.compiler.is_compiling() else _thread


@functools.cache
def reaches(kind: type) -> bool:
    """Whether a class of processors calls its softmax where it is seen, itself or by a helper."""
    run = inspect.unwrap(kind.__call__)
    names = set(getattr(getattr(run, "__code__", None), "co_names", ()))  # C functions have none
    for name in tuple(names):
        helper = run.__globals__.get(name)
        if inspect.isfunction(helper) and helper.__module__ == run.__module__:
            names |= set(helper.__code__.co_names)
    return "dispatch_attention_fn" in names or {"F", "scaled_dot_product_attention"} <= names


def stand_in(kind: type) -> type | None:
    """The class whose softmax is seen in the place of another, with the same result."""
    from diffusers.models import attention_processor

    known = kind.__module__.startswith("diffusers.") and kind.__name__ in STAND_INS
    return getattr(attention_processor, STAND_INS[kind.__name__]) if known else None


def is_marked(processor: Any) -> bool:
    """Whether a layer's processor is one of a block's."""
    return hasattr(type(processor), MARKS)


def kind_of(processor: Any) -> type:
    """The class of a processor as it is without a block."""
    return type(processor).__mro__[1] if is_marked(processor) else type(processor)


@contextmanager
def marked(marks: list[tuple[Any, Mark]]) -> Iterator[None]:
    """Calls inside belong to their layers' last marks; blocks may end in any order."""
    processors = [layer.processor for layer, _ in marks]
    seen = {stand_in(kind_of(each)) or kind_of(each) for each in processors}
    done: list[tuple[Any, Mark, Any]] = []
    try:
        with _lock:
            _wrap_points([inspect.unwrap(kind.__call__).__globals__ for kind in seen])
            for (layer, mark), processor in zip(marks, processors):
                _exchange(processor)
                vars(layer).setdefault(MARKS, []).append(mark)
                done.append((layer, mark, processor))
        yield
    finally:
        with _lock:
            for layer, mark, processor in done:
                vars(layer)[MARKS].remove(mark)
                if not vars(layer)[MARKS]:
                    del vars(layer)[MARKS]
                _layers[processor] -= 1
                if not _layers[processor]:
                    del _layers[processor]
                    processor.__class__ = kind_of(processor)
            _unwrap_points()


def _exchange(processor: Any) -> None:
    """Give a processor the class of marked ones, or refuse one that can have no other class."""
    try:
        count = _layers.get(processor, 0)
        if not is_marked(processor):
            processor.__class__ = _marked(type(processor))
    except TypeError:
        _checks.refuse("pipe", "have processors whose class can change", type(processor).__name__)
    _layers[processor] = count + 1


@functools.cache
def _marked(kind: type) -> type:
    """A class of processors that says whose call it is; isinstance and names are the kind's."""
    own, seen = kind.__call__, stand_in(kind)
    instead = None if seen is None else seen()

    @functools.wraps(own)  # diffusers looks for the names of its arguments
    def __call__(self: Any, attn: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        marks = getattr(attn, MARKS, None)
        expected = marks[-1].expected() if marks and not skips_scores(attn) else None
        if expected is None:
            return own(self, attn, *args, **kwargs)
        if instead is None:
            return _told(marks[-1], expected, own, self, attn, *args, **kwargs)
        original = functools.partial(own, self)
        return _apart(marks[-1], expected, original, instead, attn, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        """A copy of a processor is one of its kind."""
        made, given, *state = kind.__reduce_ex__(self, 1)  # later ones look at the class
        return made, tuple(kind if each is type(self) else each for each in given), *state

    own_names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, MARKS: True}
    methods = {"__call__": __call__, "__reduce_ex__": __reduce_ex__}
    methods["__new__"] = lambda _, *args, **given: kind(*args, **given)  # diffusers makes some
    return registered_like(kind, type(kind.__name__, (kind,), own_names | methods))


def _told(mark: Mark, expected: Expected, run: Callable[..., Any], *args: Any, **kw: Any) -> Any:
    """A processor's result, with its call told to the wrapped points."""
    call, slot = _Call(mark, expected), _slot()
    before, slot.call = slot.call, call
    try:
        out = run(*args, **kw)
    finally:
        slot.call = before
    if not call.done:
        mark.missed(call.seen)
    return out


def _apart(
    mark: Mark,
    expected: Expected,
    original: Callable[..., Any],
    instead: Any,
    attn: torch.nn.Module,
    hidden_states: Tensor,  # [B, M, C]
    encoder_hidden_states: Tensor | None = None,  # [B, N, C]
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """The result of a processor with a stand-in, which has the modulated rows alone."""
    if attention_mask is not None:
        _checks.refuse("attention_mask", "be None while a layout is on", "a mask")
    first, last, context = expected.first, expected.last, encoder_hidden_states
    spans, parts = ((0, first), (first, last), (last, len(hidden_states))), []
    for start, stop in [span for span in spans if span[0] < span[1]]:
        x = hidden_states[start:stop]
        given = attn, x, None if context is None else context[start:stop], None
        if start == first:
            rows = expected._replace(first=0, last=last - first)
            parts.append(_told(mark, rows, instead, *given, **kwargs))
        else:
            parts.append(original(*given, **kwargs))
    if isinstance(parts[0], tuple):
        return tuple(torch.cat(tensors) for tensors in zip(*parts))
    return torch.cat(parts)


_lock = threading.Lock()
_layers: WeakKeyDictionary[Any, int] = WeakKeyDictionary()  # marks of the layers of a processor
_blocks = 0  # that are on
_replaced: list[tuple[MutableMapping[Any, Any], Any, Any, Any]] = []  # where, name, before, now


def _wrap_points(namespaces: list[dict[str, Any]]) -> None:
    """Wrap what stands at the points that processors of these modules reach, whosever it is."""
    global _blocks
    _blocks += 1
    from diffusers.models import attention_dispatch

    registry = attention_dispatch._AttentionBackendRegistry._backends
    places = [(registry, name, _backend) for name in registry]
    places += [(space, "F", _functional) for space in namespaces if hasattr(space.get("F"), "silu")]
    ours = {id(now) for *_, now in _replaced}
    for where, name, wrap in places:
        if id(before := where[name]) not in ours:
            where[name] = wrap(before)
            _replaced.append((where, name, before, where[name]))


def _unwrap_points() -> None:
    """Put back what the last block leaves, but for what others have wrapped in the meantime."""
    global _blocks
    _blocks -= 1
    while not _blocks and _replaced:
        where, name, before, now = _replaced.pop()
        if where.get(name) is now:
            where[name] = before


@functools.cache  # torch.compile knows a function again that is the same
def _backend(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An entry of the registry, of q, k, v [B, N, H, D], that marked calls leave."""

    @functools.wraps(inner)
    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        call = _slot().call
        if call is None or not call.takes(query, key, 1):
            return inner(query, key, value, *args, **options)

        def plain(start: int, stop: int) -> Tensor:
            rows = query[start:stop], key[start:stop], value[start:stop]
            return inner(*rows, *args, **masks.of_rows(options, start, stop)).transpose(1, 2)

        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return call.attention(q, k, v, options, plain).transpose(1, 2)

    return attention


@functools.cache
def _functional(inner: types.ModuleType) -> types.ModuleType:
    """torch.nn.functional, with an attention of q, k, v [B, H, N, D] that marked calls leave."""

    @functools.wraps(inner.scaled_dot_product_attention)
    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        options.update(zip(OF_SDPA, args))
        call = _slot().call
        if call is None or query.dim() != 4 or not call.takes(query, key, 2):
            return inner.scaled_dot_product_attention(query, key, value, **options)

        def plain(start: int, stop: int) -> Tensor:
            rows = query[start:stop], key[start:stop], value[start:stop]
            return inner.scaled_dot_product_attention(*rows, **masks.of_rows(options, start, stop))

        return call.attention(query, key, value, options, plain)

    module = types.ModuleType(inner.__name__, inner.__doc__)
    vars(module).update(vars(inner), scaled_dot_product_attention=attention)
    return module
