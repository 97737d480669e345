"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import dense_attn

MODULES = [*sorted(file.stem for file in Path(dense_attn.__file__).parent.glob("[!_]*.py")), "_backends"]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    # Not dense_attn.layout_attention by attribute: that is the function.
    result = doctest.testmod(importlib.import_module(f"dense_attn.{name}"), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def test_examples_on_pipelines() -> None:
    """Every function has one; what functions return or take is shown in theirs."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    integration = importlib.import_module("dense_attn.integrations.diffusers")
    functions = {name for name in integration.__all__ if not isinstance(getattr(integration, name), type)}
    for name in functions:
        (example,) = doctest.DocTestFinder(recurse=False).find(getattr(integration, name), name)
        assert example.examples
        assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
    assert "apply_layout" in functions


@pytest.mark.parametrize("name", dense_attn.__all__)
def test_public_names_have_an_example(name: str) -> None:
    documented = getattr(dense_attn, name)
    assert doctest.DocTestFinder(recurse=False).find(documented)[0].examples
