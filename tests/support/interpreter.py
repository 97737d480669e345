"""Triton's interpreter, twice as fast and with products that are summed as a GPU sums them."""

from __future__ import annotations

import pytest
import triton.language as tl
from triton.runtime import interpreter

original_patch = interpreter._patch_lang


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


def dot_in_order(_: object, a: object, b: object, d: object, *__: object) -> object:
    """A product as a GPU sums it, column after column: equal rows give equal scores."""
    total = d.data.copy()
    for i in range(a.data.shape[1]):
        total += a.data[:, i, None].astype(total.dtype) * b.data[None, i].astype(total.dtype)
    return interpreter.TensorHandle(total, d.dtype.scalar)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, for one test."""
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_order)
