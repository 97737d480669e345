"""Triton's interpreter, faster and with products that are summed as a GPU sums them."""

from __future__ import annotations

import pytest
from triton.runtime import interpreter

from dense_attn.benchmarks.harness.interpreter import changes


def dot_in_order(_: object, a: object, b: object, d: object, *__: object) -> object:
    """A product as a GPU sums it, column after column: equal rows give equal scores."""
    total = d.data.copy()
    for i in range(a.data.shape[1]):
        total += a.data[:, i, None].astype(total.dtype) * b.data[None, i].astype(total.dtype)
    return interpreter.TensorHandle(total, d.dtype.scalar)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, for one test."""
    for change in changes():
        monkeypatch.setattr(*change)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot_in_order)
