"""What is compiled and shipped: kernels for other processors, and a source distribution that holds all its sources."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CROSS = shutil.which("aarch64-linux-gnu-g++")


@pytest.mark.skipif(CROSS is None, reason="no compiler for aarch64 on this machine")
@pytest.mark.parametrize("source", ["layout_attention.cpp", "dispatch.cpp"])
def test_kernels_compile_for_aarch64(source: str, tmp_path: Path) -> None:
    flags = ["-std=c++20", "-O1", "-Icsrc", "-DDENSE_ATTN_ISA=portable", "-Wall", "-Wextra", "-Wno-psabi", "-Werror"]
    command = [str(CROSS), *flags, "-Wno-maybe-uninitialized", "-c", f"csrc/cpu/{source}", "-o", str(tmp_path / "a.o")]
    subprocess.run(command, cwd=ROOT, check=True)


def test_a_source_distribution_is_complete(tmp_path: Path) -> None:
    """Whatever git tracks of the sources is in it, so that it builds where there is no clone."""
    command = [sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run([*command, "sdist", "--dist-dir", str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    sources = [path for folder in ("csrc", "bindings") for path in (ROOT / folder).rglob("*") if path.is_file()]
    sources += [*(ROOT / "dense_attn").glob("*.py"), *(ROOT / "benchmarks").glob("*.py"), ROOT / "examples/scene.png"]
    missing = {str(path.relative_to(ROOT)) for path in sources} - names
    assert not missing
