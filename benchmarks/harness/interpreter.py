"""Triton's interpreter, more than twice as fast: without what it does anew for every operation."""

from __future__ import annotations

from dataclasses import replace

import triton.language as tl
from triton.runtime import interpreter

_original_patch, _original_np_dtype = interpreter._patch_lang, interpreter._get_np_dtype
_np_dtypes: dict[str, object] = {}


def changes() -> list[tuple[object, str, object]]:
    """The attributes to set, each as the arguments of setattr."""
    builder = interpreter.interpreter_builder
    # Whether integers overflow takes a third of the time, and is told in debug mode alone.
    quiet = replace(builder.options, sanitize_overflow=builder.options.debug)
    return [
        (builder, "options", quiet),
        (interpreter, "_get_np_dtype", _np_dtype),
        (interpreter, "_patch_lang", _patch_once),
    ]


def _np_dtype(dtype: tl.dtype) -> object:
    """The dtype in NumPy, without the table of all of them."""
    name = dtype.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _original_np_dtype(dtype)
    return _np_dtypes[name]


def _patch_once(fn: object) -> object:
    """The language is patched, but not again for every call of a jit helper."""
    modules = [x for x in (tl, tl.core) if any(value is x for value in fn.__globals__.values())]
    if any(tl.core.is_builtin(module.load) for module in modules):
        return _original_patch(fn)
    return interpreter._LangPatchScope()
