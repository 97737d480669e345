"""What is compiled and shipped: kernels for other processors, and distributions that hold every file they need."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CROSS = shutil.which("aarch64-linux-gnu-g++")
BESIDE = ("benchmarks/", "examples/", "triton_kernels/")  # installed inside of the package
MADE = {"PKG-INFO", "setup.cfg"}  # by setuptools, in every source distribution
needs_git = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="git alone knows every file of the project"
)


@pytest.mark.skipif(CROSS is None, reason="no compiler for aarch64 on this machine")
@pytest.mark.parametrize("source", ["layout_attention.cpp", "dispatch.cpp"])
def test_kernels_compile_for_aarch64(source: str, tmp_path: Path) -> None:
    flags = ["-std=c++20", "-O1", "-Icsrc", "-DDENSE_ATTN_ISA=portable", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    command = [str(CROSS), *flags, "-Wno-maybe-uninitialized", "-c", f"csrc/cpu/{source}", "-o", str(tmp_path / "a.o")]
    subprocess.run(command, cwd=ROOT, check=True)


def setup(root: Path, folder: Path, *command: str) -> None:
    """Runs a command of setup.py; what setuptools notes about the project goes to `folder`, not into the sources."""
    folder.mkdir(exist_ok=True)
    quiet = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(folder)]
    subprocess.run([*quiet, *command], cwd=root, check=True, capture_output=True)


def unpacked_sdist(root: Path, folder: Path) -> Path:
    """A source distribution of `root`, built and unpacked."""
    setup(root, folder, "sdist", "--dist-dir", str(folder))
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        file.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if (path / "PKG-INFO").is_file() and path.suffix != ".egg-info")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def git_files(*options: str) -> set[str]:
    """The paths that git lists and that are there."""
    listed = subprocess.run(["git", "ls-files", "-z", *options], cwd=ROOT, check=True, capture_output=True, text=True)
    return {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's source distribution, unpacked."""
    return unpacked_sdist(ROOT, tmp_path_factory.mktemp("sdist"))


@needs_git
def test_a_source_distribution_holds_what_git_tracks(sdist: Path) -> None:
    """Tests, their helpers, pictures and the Makefile too: its own test suite runs from it."""
    tracked, shipped = git_files(), files(sdist) - MADE
    assert tracked - shipped == set()
    assert shipped - tracked - git_files("--others", "--exclude-standard") == set()


def test_a_source_distribution_without_git_holds_the_same(sdist: Path, tmp_path: Path) -> None:
    assert not (sdist / ".git").exists()
    assert files(unpacked_sdist(sdist, tmp_path)) == files(sdist)


@needs_git
def test_an_installation_holds_what_git_tracks(tmp_path: Path) -> None:
    """Every module, the weights, results, model cards and `py.typed`; pictures of results are for the README alone."""
    setup(ROOT, tmp_path / "egg", "build_py", "--build-lib", str(tmp_path / "lib"))

    def installed(names: set[str]) -> set[str]:
        """Where the files of packages go."""
        beside = {f"dense_attn/{name}" for name in names if name.startswith(BESIDE)}
        inside = beside | {name for name in names if name.startswith("dense_attn/")}
        return {name for name in inside if not (name.startswith("dense_attn/benchmarks/") and name.endswith(".png"))}

    tracked, shipped = installed(git_files()), files(tmp_path / "lib")
    assert {"dense_attn/py.typed", "dense_attn/examples/tiny_scenes/tiny_scenes.safetensors"} <= tracked
    assert tracked - shipped == set()
    assert shipped - tracked - installed(git_files("--others", "--exclude-standard")) == set()
