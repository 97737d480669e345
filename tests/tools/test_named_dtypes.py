"""Every tensor that the library makes names its dtype and its device in the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import tree

NAMED = {  # what makes floats, or takes the dtype of Python's numbers
    *("tensor", "as_tensor", "asarray", "scalar_tensor", "full", "zeros", "ones", "empty", "rand"),
    *("randn", "eye", "arange", "linspace", "logspace"),
}
PLACED = {"randint", "randperm"}  # integers by themselves
SOURCES = tree.python_files(
    "dense_attn", "triton_kernels", "examples/tiny_scenes", "examples/tiny_scenes_flow"
)


def nameless(source: str) -> list[int]:
    """Lines on which torch makes a tensor of a default dtype, or on a default device."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func.value) == "torch"
        and not needed(node.func.attr) <= {keyword.arg for keyword in node.keywords}
    ]


def needed(function: str) -> set[str]:
    """The arguments that a call of one of torch's functions must name."""
    if function in NAMED:
        return {"dtype", "device"}
    return {"device"} if function in PLACED else set()


@pytest.mark.parametrize("path", SOURCES, ids=tree.module_of)
def test_every_tensor_that_is_made_names_its_dtype_and_device(path: Path) -> None:
    assert nameless(path.read_text()) == []


def test_every_file_is_searched() -> None:
    assert len(SOURCES) >= 75
    assert {path.parent.name for path in SOURCES} >= {"models", "sega", "layout_attention"}


def test_a_tensor_without_a_name_is_found() -> None:
    source = "x = torch.zeros(3, device=d)\ny = torch.ones(3, dtype=t, device=d)\n"
    assert nameless(f"{source}z = torch.randperm(3)\nx.new_zeros(3)") == [1, 3]
