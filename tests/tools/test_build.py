"""Builds: kernels for other processors, distributions that hold every file, and clear refusals."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from dense_attn.__main__ import EXTRAS

ROOT = Path(__file__).resolve().parents[2]
CROSS = shutil.which("aarch64-linux-gnu-g++")
BESIDE = ("benchmarks/", "examples/", "triton_kernels/")  # installed inside of the package
PACKAGES = ("dense_attn", *(folder.rstrip("/") for folder in BESIDE))
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools, in every source distribution
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="git alone knows every file of the project",
)


@pytest.mark.skipif(CROSS is None, reason="no compiler for aarch64 on this machine")
@pytest.mark.parametrize("source", ["layout_attention.cpp", "dispatch.cpp"])
def test_kernels_compile_for_aarch64(source: str, tmp_path: Path) -> None:
    warnings = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Werror")
    flags = ("-std=c++20", "-O1", "-Icsrc", "-DDENSE_ATTN_ISA=portable")
    output = ("-c", f"csrc/cpu/{source}", "-o", str(tmp_path / "a.o"))
    subprocess.run([str(CROSS), *flags, *warnings, *output], cwd=ROOT, check=True)


def setup(root: Path, folder: Path, *command: str) -> None:
    """Run a command of setup.py; setuptools keeps its notes in `folder`, not in the sources."""
    folder.mkdir(exist_ok=True)
    quiet = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run([*quiet, *command], cwd=root, check=True, capture_output=True)


def unpacked_sdist(root: Path, folder: Path) -> Path:
    """A source distribution of `root`, built and unpacked."""
    setup(root, folder, "sdist", "--dist-dir", str(folder))
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        file.extractall(folder, filter="data")
    return next(
        path
        for path in folder.iterdir()
        if (path / "PKG-INFO").is_file() and path.suffix != ".egg-info"
    )


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def git_files(*options: str) -> set[str]:
    """The paths that git lists and that are there."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *options], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's source distribution, unpacked."""
    return unpacked_sdist(ROOT, tmp_path_factory.mktemp("sdist"))


@needs_git
def test_a_source_distribution_holds_what_git_tracks(sdist: Path) -> None:
    """Tests, their helpers, pictures and the Makefile too: its own test suite runs from it."""
    tracked, shipped = git_files(), files(sdist) - MADE
    assert len(tracked) >= 280
    assert {name.split("/")[0] for name in tracked} >= {*PACKAGES, "tests", "csrc", "docs", ".ci"}
    assert tracked - shipped == set()
    assert shipped - tracked - git_files("--others", "--exclude-standard") == set()


def test_a_source_distribution_without_git_holds_the_same(sdist: Path, tmp_path: Path) -> None:
    assert not (sdist / ".git").exists()
    assert files(unpacked_sdist(sdist, tmp_path)) == files(sdist)


@needs_git
def test_an_installation_holds_what_git_tracks(tmp_path: Path) -> None:
    """Modules, weights, results, model cards, `py.typed`; results' pictures are the README's."""
    setup(ROOT, tmp_path / "egg", "build_py", "--build-lib", str(tmp_path / "lib"))

    def installed(names: set[str]) -> set[str]:
        """Where the files of packages go."""
        beside = {f"dense_attn/{name}" for name in names if name.startswith(BESIDE)}
        inside = beside | {name for name in names if name.startswith("dense_attn/")}
        return {
            name
            for name in inside
            if not (name.startswith("dense_attn/benchmarks/") and name.endswith(".png"))
        }

    tracked, shipped = installed(git_files()), files(tmp_path / "lib")
    assert len(tracked) >= 150
    assert tracked >= {
        "dense_attn/py.typed",
        "dense_attn/integrations/diffusers/models/__init__.py",
        "dense_attn/triton_kernels/sega/__init__.py",
        "dense_attn/benchmarks/harness/__init__.py",
        "dense_attn/examples/tiny_scenes/tiny_scenes.safetensors",
        "dense_attn/examples/tiny_scenes_flow/tiny_scenes_flow.safetensors",
    }
    assert tracked - shipped == set()
    assert shipped - tracked - installed(git_files("--others", "--exclude-standard")) == set()


@needs_git
@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_a_changed_source_is_built_again() -> None:
    """The Makefile names every source of the sanitized library, however deep it lies."""
    command = ["make", "--dry-run", "--print-data-base", "fuzz"]
    database = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (line,) = re.findall(r"^build/sanitize/\.built: (.*)", database, re.M)
    native = {name for name in git_files("csrc", "bindings") if name.endswith((".h", ".cpp"))}
    modules = {name for name in git_files(*PACKAGES) if name.endswith(".py")}
    assert len(native) >= 20
    assert len(modules) >= 130
    assert (native | modules) - set(line.split()) == set()


def test_info_lists_the_extras() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    names = {
        extra: tuple(re.match(r"[\w.-]+", package)[0] for package in extras[extra])
        for extra in extras
    }
    assert names == EXTRAS
    assert set(names["diffusers"]) >= {
        "diffusers",
        "transformers",
    }  # which diffusers does not bring


def refusal(tmp_path: Path, script: str = "", **environment: str) -> str:
    """The last line of a build that fails, after a script that changes what setup.py finds."""
    program = f"import runpy, sys\n{script}\nrunpy.run_path('setup.py')"
    egg = ("egg_info", "--egg-base", str(tmp_path))
    out = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    command = [sys.executable, "-c", program, "--quiet", *egg, *out]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def compiler(tmp_path: Path, text: str) -> str:
    """The path of a script that stands in for a compiler."""
    path = tmp_path / "cxx"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


WITHOUT = (
    "; without CPU kernels the library still runs, on its PyTorch reference and, on GPUs, on "
    "Triton: DENSE_ATTN_CPU_KERNELS=0 pip install --no-build-isolation ."
)


def test_an_old_setuptools_is_named(tmp_path: Path) -> None:
    for version in ("68.2.2", "75.0.0.post1"):
        said = refusal(tmp_path, f"import setuptools; setuptools.__version__ = {version!r}")
        needed = "dense_attn must be built with setuptools 77 or newer"
        assert said == f"{needed}, got {version}: pip install 'setuptools>=77'"


def test_a_build_without_a_compiler_ends_with_what_to_install(tmp_path: Path) -> None:
    needed = "error: the CPU kernels must have a C++20 compiler, got '/no/compiler'"
    advice = "install g++ 12 or newer, or name a compiler in CXX"
    expected = f"{needed} (No such file or directory): {advice}{WITHOUT}"
    assert refusal(tmp_path, CXX="/no/compiler") == expected


def test_a_compiler_that_writes_nothing_is_no_compiler(tmp_path: Path) -> None:
    said = refusal(tmp_path, CXX=compiler(tmp_path, "exit 0"))
    assert said.startswith(
        "error: the CPU kernels must have a C++20 compiler, got one that writes no file: install "
    )


def test_a_name_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    assert (
        refusal(tmp_path, CXX="g++ '")
        == 'error: CXX must name a compiler, got "g++ \'": No closing quotation'
    )


@pytest.mark.parametrize("named", ["", " "])
def test_an_empty_name_is_as_if_it_were_not_there(named: str, tmp_path: Path) -> None:
    usual = "import sysconfig; found = sysconfig.get_config_var\n"
    usual += (
        "sysconfig.get_config_var = lambda name: '/the/usual -x' if name == 'CXX' else found(name)"
    )
    nowhere = {"PATH": str(tmp_path), "DENSE_ATTN_CPU_KERNELS": "1"}
    said = refusal(tmp_path, usual, CXX=named, **nowhere)
    assert "got '/the/usual' (No such file or directory): " in said


def test_a_build_with_an_old_compiler_ends_with_what_to_install(tmp_path: Path) -> None:
    error = "g++: error: unrecognized command-line option '-std=c++20'"
    old = compiler(tmp_path, f'echo "{error}" >&2; exit 1')
    said = refusal(tmp_path, CXX=old)
    assert f"must have a C++20 compiler, got {old!r} ({error}): " in said
    assert said.endswith(WITHOUT)


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on this machine")
def test_a_compiler_without_vector_shuffles_is_named(tmp_path: Path) -> None:
    said = refusal(tmp_path, CXX="g++ -D__has_builtin(x)=0")
    error = "<stdin>:5:2: error: #error no __builtin_shufflevector, which g++ has from 12 on"
    assert f"got 'g++' ({error}): install " in said


def test_a_build_that_does_not_compile_ends_with_what_works_without(tmp_path: Path) -> None:
    """A compiler of several words is called with all of them."""
    odd = compiler(
        tmp_path, 'case "$*" in "-first "*-fsyntax-only*) exit 0;; esac; echo no >&2; exit 1'
    )
    said = refusal(tmp_path, CXX=f"{odd} -first")
    assert said.startswith(
        "error: the CPU kernels did not compile, as the compiler says above (command "
    )
    assert said.endswith(WITHOUT)


NVCC = "error: the CUDA kernels must have nvcc 12.8 or newer, got "
NO_NVCC = {  # what stands in CUDA_HOME, and what the sentence says of it
    "none": ("", "none in {}"),
    "old": ("echo release 12.6, V12.6.20", "12.6"),
    "silent": ("exit 0", "'{}/nvcc', which says no version"),
}


@pytest.mark.parametrize("kind", NO_NVCC)
def test_a_build_for_cuda_without_a_usable_nvcc_ends_with_what_to_install(
    kind: str, tmp_path: Path
) -> None:
    text, got = NO_NVCC[kind]
    folder = tmp_path / "bin"
    folder.mkdir()
    if text:
        Path(compiler(tmp_path, text)).rename(folder / "nvcc")
    said = refusal(tmp_path, CUDA_HOME=str(tmp_path), DENSE_ATTN_CUDA="1")
    advice = "install the CUDA toolkit, or name its folder in CUDA_HOME"
    without = "without CUDA kernels the library still runs, on GPUs on Triton: DENSE_ATTN_CUDA=0"
    assert said.startswith(f"{NVCC}{got.format(folder)}: {advice}; {without} pip install ")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("ARCHS", "80,hopper", "like 80,90"),
        ("HEAD_DIMS", "40,41", "of 40, 64, 80, 96, 128, 160, 256"),
    ],
)
def test_what_a_library_is_not_made_for_is_refused(
    name: str, value: str, rule: str, tmp_path: Path
) -> None:
    name, got = f"DENSE_ATTN_CUDA_{name}", value.split(",")[1]
    said = refusal(tmp_path, **{"DENSE_ATTN_CUDA": "1", name: value})
    assert said == f"error: {name} must be {rule}, got {got!r}"


NO_TORCH = {  # a script that takes it away, and the end of the sentence
    "no torch": (
        "sys.modules['torch'] = None",
        "is, got import of torch halted; None in sys.modules: pip install torch",
    ),
    "an old torch": (
        "import torch; torch.__version__ = '2.9.1+cpu'",
        "is, got 2.9.1+cpu: pip install --upgrade torch",
    ),
    "no headers": (
        "import torch.utils.cpp_extension as c; c.include_paths = lambda: ['/nowhere']",
        "is with its headers, got none in /nowhere: pip install torch",
    ),
}


@pytest.mark.parametrize("missing", NO_TORCH)
def test_a_build_without_a_usable_torch_ends_with_what_to_install(
    missing: str, tmp_path: Path
) -> None:
    script, sentence = NO_TORCH[missing]
    needed = "error: the CPU kernels must be built where torch 2.11 or newer"
    assert refusal(tmp_path, script) == f"{needed} {sentence}{WITHOUT}"


def test_a_build_without_cpu_kernels_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        refusal(tmp_path, DENSE_ATTN_CPU_KERNELS="2")
        == "DENSE_ATTN_CPU_KERNELS must be 1 or 0, got '2'"
    )
    monkeypatch.setenv("DENSE_ATTN_CPU_KERNELS", "0")
    monkeypatch.setenv("CXX", "/no/compiler")
    folders = ("--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib"))
    setup(ROOT, tmp_path / "egg", "build", *folders)
    assert (tmp_path / "lib/dense_attn/__init__.py").is_file()
    assert list((tmp_path / "lib").rglob("*.so")) == []
