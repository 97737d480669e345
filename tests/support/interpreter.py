"""Triton's interpreter, thrice as fast and with products that are summed as a GPU sums them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import triton.language as tl
from triton.runtime import interpreter

original_patch = interpreter._patch_lang
original_np_dtype = interpreter._get_np_dtype
np_dtypes: dict[str, object] = {}


def patch_once(fn: object) -> object:
    """The interpreter patches triton.language anew for every call of a jit helper, which takes half
    of the time.
    """
    seen = [
        module
        for module in (tl, tl.core)
        if any(value is module for value in fn.__globals__.values())
    ]
    if any(tl.core.is_builtin(module.load) for module in seen):
        return original_patch(fn)
    return interpreter._LangPatchScope()


def np_dtype(dtype: tl.dtype) -> object:
    """The dtype in NumPy, for which the interpreter makes a table of all each time."""
    name = dtype.scalar.name
    if name not in np_dtypes:
        np_dtypes[name] = original_np_dtype(dtype)
    return np_dtypes[name]


def dot_in_order(_: object, a: object, b: object, d: object, *__: object) -> object:
    """A product as a GPU sums it, column after column: equal rows give equal scores."""
    total = d.data.copy()
    for i in range(a.data.shape[1]):
        total += a.data[:, i, None].astype(total.dtype) * b.data[None, i].astype(total.dtype)
    return interpreter.TensorHandle(total, d.dtype.scalar)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, for one test."""
    # Whether integers overflow takes a third of the time, and only a kernel in debug mode is told.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    options = replace(options, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(interpreter, "_get_np_dtype", np_dtype)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_order)
