"""The examples in the docstrings run, and every public name has one."""

from __future__ import annotations

import doctest
import importlib

import pytest
import tree

import dense_attn

LIBRARY = sorted(
    name for name in tree.modules() if tree.family_of(name) in {*tree.ARROWS} - {"triton_kernels"}
)


def test_the_modules_are_all_there() -> None:
    assert len(LIBRARY) >= 30
    assert {"dense_attn.sega.op", "dense_attn._backends.table"} <= set(LIBRARY)


@pytest.mark.parametrize("name", LIBRARY)
def test_examples(name: str) -> None:
    # Not dense_attn.layout_attention by attribute: that is the function.
    result = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert result.failed == 0


def test_examples_on_pipelines() -> None:
    """Every function has one; what functions return or take is shown in theirs."""
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    integration = importlib.import_module("dense_attn.integrations.diffusers")
    functions = {
        name for name in integration.__all__ if not isinstance(getattr(integration, name), type)
    }
    for name in functions:
        (example,) = doctest.DocTestFinder(recurse=False).find(getattr(integration, name), name)
        assert example.examples
        assert (
            doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
        )
    assert "apply_layout" in functions


@pytest.mark.parametrize("name", dense_attn.__all__)
def test_public_names_have_an_example(name: str) -> None:
    documented = getattr(dense_attn, name)
    assert doctest.DocTestFinder(recurse=False).find(documented)[0].examples
