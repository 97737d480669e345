"""Names of files, modules and kernels in texts, which still find them."""

from __future__ import annotations

import ast
import re
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULE = re.compile(r"\"?-m\"?,? \"?(dense_attn(?:\.\w+)+)")
NAME = re.compile(r"\"(dense_attn\.(?:benchmarks|examples|triton_kernels)(?:\.\w+)*)\"")
TEXTS = ("*.py", "*.md", "*.yml", "*.toml", "*.sh")


def texts() -> list[Path]:
    """The project's files of words, Makefile included."""
    folders = ("benchmarks", "dense_attn", "docs", "examples", "tests", "triton_kernels", ".ci")
    found = [path for name in folders for kind in TEXTS for path in (ROOT / name).rglob(kind)]
    others = (ROOT / "Makefile", ROOT / "README.md", ROOT / "setup.py", ROOT / ".ci" / "run")
    return [*found, *others]


def test_the_suite_runs_every_file_of_rows() -> None:
    run = pytest.importorskip("dense_attn.benchmarks.run")
    folder = ROOT / "benchmarks"
    assert folder == run._FOLDER
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("test_*.py")}
    assert set(run._TESTS) == there
    assert len(there) == 5


def test_modules_that_text_names_are_there() -> None:
    named = {
        name
        for path in texts()
        for pattern in (MODULE, NAME)
        for name in pattern.findall(path.read_text("utf-8"))
    }
    expected = (
        "benchmarks.host_cost.launches",
        "benchmarks.host_cost.stubbed",
        "benchmarks.compiled.kernel_table",
        "benchmarks.layout_attention.pipeline",
    )
    assert named >= {f"dense_attn.{name}" for name in expected}
    for name in named:
        assert find_spec(name) is not None, name


def jit_functions() -> set[str]:
    """The kernels that are written, wherever they lie."""
    nodes = [
        node
        for path in (ROOT / "triton_kernels").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
    ]
    jitted = [x for x in nodes if isinstance(x, ast.FunctionDef) and x.decorator_list]
    return {
        node.name
        for node in jitted
        if node.name.endswith("_kernel")
        and any(
            ast.unparse(decorator).startswith("triton.jit") for decorator in node.decorator_list
        )
    }


def test_every_kernel_is_watched() -> None:
    """In a process of its own, since what is watched stays so."""
    pytest.importorskip("triton")
    program = """
from dense_attn.benchmarks.host_cost import launches
from dense_attn.triton_kernels import layout_attention, reversible, sega
from dense_attn.triton_kernels.layout_attention import fwd_specialised, lists
from dense_attn.triton_kernels.sega import selection
idle = launches.watch()
print(*sorted(idle))
for module in (layout_attention, fwd_specialised, lists, reversible, sega, selection):
    for name, kernel in vars(module).items():
        if name.endswith("_kernel"):
            kernel[(1,)]
print(*sorted(idle))
"""
    done = forked.run(program)
    assert done.returncode == 0, done.stderr
    watched, idle = done.stdout.split("\n")[:2]
    assert set(watched.split()) == jit_functions()
    assert len(jit_functions()) == 19
    assert idle == ""
