"""How the sources of the CUDA library are compiled: `bindings/cuda/build.py`, of this checkout."""

from __future__ import annotations

import runpy
import subprocess
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[3]
_DIGITS = 16


class Job(NamedTuple):
    """A compilation of a source: for one class of head dims, or for all (None)."""

    source: str
    head_dim: int | None
    flags: tuple[str, ...]


@cache
def build() -> dict[str, Any]:
    """The names of `bindings/cuda/build.py`; raises FileNotFoundError without the sources."""
    return runpy.run_path(str(ROOT / "bindings" / "cuda" / "build.py"))


def jobs() -> Iterator[Job]:
    """Every compilation that makes the library's kernels."""
    for source, variant, flags in build()["jobs"]():
        class_ = variant.removeprefix("head_dim_")
        yield Job(source, int(class_) if class_.isdigit() else None, tuple(flags))


def compile_to(job: Job, path: Path, *more: str) -> str:
    """Compile into a file; the words of the compiler."""
    command = [build()["nvcc"](), *job.flags, *more, job.source, "-o", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{job.source} must compile, got {done.stderr[-4000:]}")
    return done.stderr


def version() -> str:
    """The compiler's release."""
    command = [build()["nvcc"](), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return said.partition("release ")[2].partition(",")[0]


def hashes() -> dict[str, str]:
    """The first digits of each source's and header's sha256, by its path below `csrc`."""
    csrc = ROOT / "csrc"
    files = [*csrc.glob("*.h"), *csrc.glob("common/*.h"), *(csrc / "cuda").rglob("*.*")]
    named = {path.relative_to(csrc).as_posix(): path for path in files if path.is_file()}
    return {
        name: sha256(named[name].read_bytes()).hexdigest()[:_DIGITS]
        for name in sorted(named)
        if not name.endswith((".py", ".pyc"))
    }
