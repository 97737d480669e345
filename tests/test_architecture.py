"""The rules of the design that a machine can hold: imports, one name an op, names, sizes, prose."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import tree
from tree import ROOT

import dense_attn
from dense_attn import reference
from dense_attn._backends import ops, table

MODULES = tree.modules()
FOLDERS = ("dense_attn", "triton_kernels", "benchmarks", "tests", "examples", ".ci")
PYTHON = [*tree.python_files(*FOLDERS, "bindings"), ROOT / "setup.py"]
KERNELS = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
CPP = [
    *KERNELS,
    *sorted(path for end in ("h", "cpp") for path in (ROOT / "bindings").rglob(f"*.{end}")),
]
TORCH_IN_KERNEL = re.compile(r'#\s*include\s*[<"](torch|ATen|c10|caffe2|pybind11|Python\.h)')
MOST_FILES = 15  # in one folder
PUBLIC = {
    "SemanticGuidance",
    "spectral_residual_saliency",
    "ddim_step",
    "ReversibleSampler",
    "ddim_step_inverse",
    "backends",
    "optimize_latents",
    "OptimizeResult",
    "OffGridError",
    "percentile_mask",
    "layout_attention",
    "Layout",
    "LayoutBias",
    "memory_efficient_attention",
    "sega_guidance",
    "tile_lists",
}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_file_is_looked_at() -> None:
    """A search that finds nothing would hold every rule."""
    folders = Counter(path.relative_to(ROOT).parts[0] for path in PYTHON)
    least = {"dense_attn": 60, "tests": 80, "benchmarks": 35, "examples": 12, "triton_kernels": 10}
    assert {name for name, count in least.items() if folders[name] < count} == set()
    assert folders.keys() == {*least, ".ci", "bindings", "setup.py"}
    assert folders[".ci"] >= 3
    assert len(MODULES) >= 130
    assert len(CPP) >= 20
    assert sum(len(tree.docstrings(path.read_text())) for path in PYTHON) >= 1300
    assert sum(len(function_sizes(path.read_text())) for path in PYTHON) >= 2000
    assert sum(len(tree.imports(path, MODULES)) for path in MODULES.values()) >= 350


@pytest.mark.parametrize("module", MODULES)
def test_import_arrows(module: str) -> None:
    family = tree.family_of(module)
    imported = {tree.family_of(name) for name in tree.imports(MODULES[module], MODULES)} - {family}
    if family not in tree.ON_TOP:
        assert imported <= tree.ARROWS[family]


def test_no_import_goes_in_a_circle() -> None:
    graph = {name: tree.imports(path, MODULES, top=True) for name, path in MODULES.items()}
    assert tree.cycles(graph) == []


def test_backends_do_not_import_each_other() -> None:
    """Nor the table of them; what they share is the contract, and the maths under it."""
    shared = {f"dense_attn._backends.{name}" for name in ("contract", "ops", "plans", "raw_checks")}
    for backend in ("cpu", "cuda", "reference", "triton"):
        imported = tree.imports(MODULES[f"dense_attn._backends.{backend}"], MODULES)
        assert {name for name in imported if tree.family_of(name) == "_backends"} <= shared


def test_a_wrong_arrow_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Absolute and relative ones, at the top and inside of functions."""
    monkeypatch.setattr(tree, "ROOT", tmp_path)
    (tmp_path / "dense_attn" / "sega").mkdir(parents=True)
    path = tmp_path / "dense_attn" / "sega" / "op.py"
    path.write_text(
        "from ..verify import attention\ndef f():\n    from dense_attn import demo\n    import os\n"
    )
    known = dict.fromkeys(
        ("dense_attn.verify", "dense_attn.verify.attention", "dense_attn.demo"), path
    )
    assert tree.imports(path, known) == {"dense_attn.verify.attention", "dense_attn.demo"}
    assert tree.imports(path, known, top=True) == {"dense_attn.verify.attention"}
    assert tree.cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


def test_no_folder_is_crowded() -> None:
    files = Counter(path.parent for path in [*PYTHON, *CPP] if path.name != "__init__.py")
    assert {relative(folder): count for folder, count in files.items() if count > MOST_FILES} == {}


@pytest.mark.parametrize("path", tree.python_files("dense_attn"), ids=relative)
def test_the_library_imports_torch_and_numpy_alone(path: Path) -> None:
    """Extras are imported inside the function that needs them."""
    modules = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules.add(node.module.split(".")[0])
    standard = __import__("sys").stdlib_module_names
    allowed = {"torch", "numpy", "dense_attn"}
    if path.name == "modular_guider.py":  # a subclass of diffusers' own
        allowed |= {"diffusers"}
    assert {name for name in modules if name not in standard} <= allowed


@pytest.mark.parametrize("path", KERNELS, ids=relative)
def test_kernels_know_no_torch(path: Path) -> None:
    assert not TORCH_IN_KERNEL.search(path.read_text())


def test_the_ban_on_torch_can_fail() -> None:
    assert TORCH_IN_KERNEL.search("#include <torch/all.h>")
    hook = (ROOT / ".pre-commit-config.yaml").read_text()
    assert TORCH_IN_KERNEL.pattern in hook


@pytest.mark.parametrize("file", sorted(set(table.OPS.values())))
def test_a_family_has_one_name(file: str) -> None:
    for path in (
        f"dense_attn/{file}/__init__.py",
        f"csrc/{file}.h",
        f"csrc/cpu/{file}.cpp",
        f"bindings/{file}.cpp",
    ):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("op", ["layout_attention", "percentile_mask", "sega_guidance"])
def test_the_reference_has_the_public_parameters(op: str) -> None:
    """And, in the place of the options that make them, the rates of semantic guidance."""
    rates = dict(zip(("edit_weights", "warm", "enabled"), ("weights", "partials", "all_warm")))
    public = inspect.signature(getattr(dense_attn, op)).parameters
    parameters = inspect.signature(getattr(reference, op)).parameters
    named = [rates.get(name, name) for name in public]
    assert [name for name in named if name in parameters] == list(parameters)


@pytest.mark.parametrize("op", sorted(ops.OPS.keys() - table.reference.NO_KERNELS))
def test_the_reference_has_the_names_and_parameters_of_the_raw_ops(op: str) -> None:
    parameters = inspect.signature(getattr(table.reference, op)).parameters
    schema = torch._C.parse_schema(op + ops.OPS[op].schema)
    assert list(parameters) == [argument.name for argument in schema.arguments]


def test_public_names_are_those_of_the_api() -> None:
    assert set(dense_attn.__all__) <= PUBLIC
    assert dense_attn.__all__ == sorted(dense_attn.__all__)
    sources = [MODULES[name].read_text() for name in MODULES if tree.family_of(name) in tree.ARROWS]
    for name in PUBLIC:  # what is written is exported
        defined = any(re.search(rf"^(def|class) {name}\b", source, re.M) for source in sources)
        assert not defined or hasattr(dense_attn, name), name


def test_the_signature_is_that_of_the_api() -> None:
    parameters = (
        "q: Tensor, k: Tensor, v: Tensor, q_regions: Tensor, k_regions: Tensor",
        "strength: Tensor | float = 1.0, *, modulation: str = range, scale: float | None = None",
        "k_mask: Tensor | None = None, return_lse: bool = False",
        "q_order: Tensor | bool | None = None",
        "k_order: Tensor | bool | None = None",
        "tile_lists: tuple[Tensor | None, ...] | None = None, backend: str = auto",
    )
    expected = f"({', '.join(parameters)}) -> Tensor | tuple[Tensor, Tensor]"
    assert str(inspect.signature(dense_attn.layout_attention)).replace("'", "") == expected


PARAMETERS = {
    "percentile_mask": "x level dim backend",
    "sega_guidance": """
        eps_uncond eps_text eps_edits momentum guidance_scale edit_guidance_scale edit_threshold
        edit_weights warm enabled reverse edit_momentum_scale edit_mom_beta backend""",
    "SemanticGuidance": """
        guidance_scale edit_guidance_scale edit_threshold edit_warmup_steps edit_cooldown_steps
        edit_weights reverse_editing_direction edit_momentum_scale edit_mom_beta backend""",
    "ddim_step": "x eps alpha_bar_t alpha_bar_prev eps_uncond guidance_scale backend",
    "ddim_step_inverse": "x eps alpha_bar_t alpha_bar_prev eps_uncond guidance_scale backend",
    "ReversibleSampler": """
        alphas_cumprod timesteps method mix gamma alternate exact final_alpha_cumprod dtype
        backend""",
    "optimize_latents": """
        sampler eps_fn decode_fn loss_fn x steps saliency_fn salient_weight clip momentum noise
        renormalize tie generator progress""",
    "spectral_residual_saliency": "image",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_parameters_are_those_of_the_api(name: str) -> None:
    """In its order; others may stand beside them."""
    expected = PARAMETERS[name].split()
    found = inspect.signature(getattr(dense_attn, name)).parameters
    assert [parameter for parameter in found if parameter in expected] == expected


@pytest.mark.parametrize("path", [*PYTHON, *CPP], ids=relative)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= (330 if path.suffix == ".py" else 400)


def function_sizes(source: str) -> dict[str, int]:
    """Lines of each function's body, its docstring left out, by its name and line."""
    sizes = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            sizes[f"{node.name}:{node.lineno}"] = (
                node.end_lineno - body[0].lineno + 1 if body else 0
            )
    return sizes


@pytest.mark.parametrize("path", PYTHON, ids=relative)
def test_functions_are_short(path: Path) -> None:
    most = 84 if relative(path).startswith("triton_kernels/") else 44
    sizes = function_sizes(path.read_text())
    assert {name: size for name, size in sizes.items() if size > most} == {}


def test_functions_of_one_name_are_measured_each() -> None:
    source = '''
class A:
    def f(self):
        """Two lines."""
        x = 1
        return x
class B:
    def f(self): pass
'''
    assert function_sizes(source) == {"f:3": 2, "f:8": 1}


UNREADABLE_ALONE = re.compile("(Of|What|As|By|The same) ")


def test_docstrings_name_their_noun() -> None:
    """Each can be read where nothing else is: in a list, or on a page of the documentation."""
    found = [
        f"{relative(path)}:{name}: {text.splitlines()[0]}"
        for path in PYTHON
        for name, text in tree.docstrings(path.read_text()).items()
        if UNREADABLE_ALONE.match(text)
    ]
    assert found == [], "\n".join(found)


def test_a_docstring_without_a_noun_is_seen() -> None:
    source = '''"""What it is."""
class A:
    """Of A."""
    async def f(self):
        """The
        sameness."""
        def g(): "As f."
'''
    found = tree.docstrings(source)
    assert list(found) == ["module:1", "A:2", "f:4", "g:7"]
    assert [bool(UNREADABLE_ALONE.match(text)) for text in found.values()] == [
        True,
        True,
        False,
        True,
    ]


def test_tables_of_data_alone_are_laid_out_by_hand() -> None:
    """The formatter lays out all else; who reads a file need not ask why a call looks so."""
    skips = {relative(path): tree.unformatted(path.read_text()) for path in PYTHON}
    assert sum(map(len, skips.values())) >= 10
    found = [f"{name}:{line}" for name, lines in skips.items() for line in lines if not lines[line]]
    assert found == [], "\n".join(found)


def test_code_that_is_laid_out_by_hand_is_seen() -> None:
    source = """
TABLE = {1: 2, 3: 4}  # fmt: skip
@pytest.mark.parametrize("x", (1,
                               2))  # fmt: skip
def f(x,
      y): # fmt: skip
    z = g(x, [1, 2])  # fmt: skip
    "# fmt: skip"
    return x  # fmt: skip
"""
    assert tree.unformatted(source) == {2: True, 4: True, 6: False, 7: False, 9: False}


def test_the_version_stands_once() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", dense_attn.__version__)
    assert f"## {dense_attn.__version__} " in (ROOT / "CHANGELOG.md").read_text()
    assert not re.search(r"^version\s*=\s*\"", (ROOT / "pyproject.toml").read_text(), re.M)
