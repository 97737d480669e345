"""The project's files, the arrows between its modules, and its prose, as tests of them see them."""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {  # where the modules of a package lie, the longest name first
    "dense_attn.triton_kernels": "triton_kernels",
    "dense_attn.benchmarks": "benchmarks",
    "dense_attn.examples": "examples",
    "dense_attn": "dense_attn",
}
ARROWS: dict[str, set[str]] = {  # what each family of modules may import; no other arrow exists
    "_checks": set(),
    "_dtypes": set(),
    "_environment": set(),
    "_files": set(),
    "_kernel_hashes": set(),
    "_memory": set(),
    "_progress": set(),
    "_pixels": {"_checks"},
    "_tuned": {"_environment", "_files", "_progress"},
    "reference": {"_dtypes"},
    "triton_kernels": set(),
    "_backends": {
        *("_checks", "_dtypes", "_environment", "_kernel_hashes", "_tuned"),
        *("reference", "triton_kernels"),
    },
    "layout_attention": {"_backends", "_checks", "_dtypes", "_memory"},
    "sega": {"_backends", "_checks", "_memory", "reference"},
    "reversible": {"_backends", "_checks", "_memory", "_progress", "reference"},
    "optimize": {"_checks", "_progress", "reversible"},
    "dense_attn": {"_backends", "layout_attention", "optimize", "reversible", "sega"},
}
# Programs and what stands on the library: they import from it, and nothing of it imports them.
ON_TOP = {
    "__main__",
    "_command",
    "_kernel_report",
    "benchmarks",
    "demo",
    "examples",
    "integrations",
    "verify",
}


def python_files(*folders: str) -> list[Path]:
    """Every Python file below these folders, however deep."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def module_of(path: Path) -> str:
    """The dotted name of a file of a package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    package = next(name for name, folder in PACKAGES.items() if folder == parts[0])
    return ".".join([package, *(parts[1:-1] if parts[-1] == "__init__" else parts[1:])])


def modules() -> dict[str, Path]:
    """Every module of the installed package by its name."""
    return {module_of(path): path for path in python_files(*PACKAGES.values())}


def imports(path: Path, known: dict[str, Path], *, top: bool = False) -> set[str]:
    """The modules among `known` that a file imports; with `top` only those of its import itself."""
    here, names = module_of(path), set()
    for node in statements(ast.parse(path.read_text("utf-8")), top):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        else:
            base = absolute(node, here, path.name == "__init__.py")
            names |= {
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in known else base
                for alias in node.names
            }
    return {name for name in names if name in known}


def statements(tree: ast.Module, top: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements of a module; `top` leaves out functions and `if TYPE_CHECKING`."""
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif not (
            (top and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))
            or (top and typed_only(node))
        ):
            waiting += ast.iter_child_nodes(node)


def typed_only(node: ast.AST) -> bool:
    """Whether a statement is `if TYPE_CHECKING:`."""
    return (
        isinstance(node, ast.If)
        and isinstance(node.test, ast.Name)
        and node.test.id == "TYPE_CHECKING"
    )


def absolute(node: ast.ImportFrom, here: str, package: bool) -> str:
    """The module that a `from` names, seen from the module `here`."""
    if not node.level:
        return node.module or ""
    parts = here.split(".")
    parts = parts[: len(parts) - node.level + package]
    return ".".join([*parts, *([node.module] if node.module else [])])


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """The modules that reach themselves."""
    found = []
    for start in graph:
        seen, waiting = set(), list(graph[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += graph.get(name, ())
        found += [start] * (start in seen)
    return found


def family_of(module: str) -> str:
    """The folder or file of the package that a module lies in; its own file is "dense_attn"."""
    return module.split(".")[1] if "." in module else module


def docstrings(source: str) -> dict[str, str]:
    """The docstrings of a file by the names and lines of what they describe."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return {
        f"{getattr(node, 'name', 'module')}:{getattr(node, 'lineno', 1)}": text
        for node in ast.walk(ast.parse(source))
        if isinstance(node, kinds) and (text := ast.get_docstring(node))
    }


def unformatted(source: str) -> dict[int, bool]:
    """The lines of a file that end in `# fmt: skip`, and whether each ends a table of data."""
    lines = [
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and "fmt: skip" in token.string
    ]
    ends = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) and is_data(node.value):
            ends.add(node.end_lineno)
        for decorator in getattr(node, "decorator_list", ()):
            if ast.unparse(decorator).startswith("pytest.mark.parametrize("):
                ends.add(decorator.end_lineno)
    return {line: line in ends for line in lines}


def is_data(value: ast.expr | None) -> bool:
    """Whether an expression is a table: a display of several entries, or several displays."""
    if isinstance(value, ast.BinOp):
        return is_data(value.left) and is_data(value.right)
    entries = getattr(value, "keys", None) or getattr(value, "elts", ())
    return isinstance(value, (ast.Tuple, ast.List, ast.Set, ast.Dict)) and len(entries) > 1
