"""The CUDA library's sources and nvcc's options, for setup.py and the tests' emulated build.

Knows the standard library alone.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path

OLDEST_NVCC = (12, 8)  # the first that knows every architecture below and compresses for size
_ROOT = Path(__file__).parents[2]
_CLASSES = _ROOT / "csrc" / "cuda" / "head_dims.h"
# Every file that the library is made of lies here.
_MADE_OF = ("csrc/*.h", "csrc/common/*.h", "csrc/cuda/**/*.*", "bindings/*.h", "bindings/cuda/*.*")
HEAD_DIMS = re.findall(r"f\((\d+)\)", _CLASSES.read_text("utf-8"))
# Sources of each family, whose binding has its name; some are compiled once a head dim's class.
OF_A_HEAD_DIM = tuple(f"csrc/cuda/layout_attention_{name}.cu" for name in ("bwd", "fwd", "row"))
CHOOSER = "csrc/cuda/layout_attention.cu"  # among the classes
KERNELS = {  # what takes longest first, so that no core waits for it at the end
    "sega": ("csrc/cuda/sega.cu",),
    "layout_attention": (*OF_A_HEAD_DIM, CHOOSER),
    "reversible": ("csrc/cuda/reversible.cu",),
}
# Grid steps and thresholds must be the same bits on every device.
SOURCE_FLAGS = {f"csrc/cuda/{name}.cu": ("-fmad=false",) for name in ("reversible", "sega")}
ARCHS = ("80", "86", "89", "90", "100", "120")
# All are made from one PTX, which no source asks more of, and which is there for GPUs to come: one
# for each takes twice the time.
PTX = "compute_80"
FLAGS = (
    *("-std=c++20", "-O3", "-Icsrc", "--forward-unknown-to-host-compiler", "-fPIC"),
    *("-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-missing-field-initializers"),
    "-Werror=all-warnings",
)
BINDING_FLAGS = ("-Ibindings", "-Wno-psabi", "-Wno-error")  # torch's headers are not ours
NEEDED, ADVICE = (
    "the CUDA kernels must have nvcc {}.{} or newer".format(*OLDEST_NVCC),
    "install the CUDA toolkit, or name its folder in CUDA_HOME",
)
WITHOUT = (
    "without CUDA kernels the library still runs, on GPUs on Triton: "
    "DENSE_ATTN_CUDA=0 pip install --no-build-isolation ."
)


class NvccError(Exception):
    """No nvcc that can compile the kernels; the message is one sentence."""


def nvcc() -> str:
    """The compiler; raises NvccError where there is none that will do."""
    home = os.environ.get("CUDA_HOME")
    found = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if found is None:
        where = f"none in {os.path.join(home, 'bin')}" if home else "none"
        raise NvccError(f"{NEEDED}, got {where}: {ADVICE}; {WITHOUT}")
    try:
        said = subprocess.run([found, "--version"], capture_output=True, text=True, check=False)
    except OSError as error:
        raise NvccError(
            f"{NEEDED}, got {found!r} ({error.strerror}): {ADVICE}; {WITHOUT}"
        ) from None
    release = re.search(r"release (\d+)\.(\d+)", said.stdout)
    if release is None or tuple(map(int, release.groups())) < OLDEST_NVCC:
        got = f"{release[1]}.{release[2]}" if release else f"{found!r}, which says no version"
        raise NvccError(f"{NEEDED}, got {got}: {ADVICE}; {WITHOUT}")
    return found


def code(archs: str | None) -> list[str]:
    """The options that name the architectures: all, or those of a text like "80,90"."""
    cubins = archs.split(",") if archs else ARCHS
    if unknown := [name for name in cubins if not re.fullmatch(r"\d{2,3}", name)]:
        raise NvccError(f"DENSE_ATTN_CUDA_ARCHS must be like 80,90, got {unknown[0]!r}")
    if unknown := [name for name in head_dims() if name not in HEAD_DIMS]:
        known = ", ".join(HEAD_DIMS)
        raise NvccError(f"DENSE_ATTN_CUDA_HEAD_DIMS must be of {known}, got {unknown[0]!r}")
    made = ",".join([*(f"sm_{name}" for name in cubins), PTX])
    return [f"-gencode=arch={PTX},code=[{made}]", "--compress-mode=size"]


def head_dims() -> list[str]:
    """The classes of head dims that are compiled: those that a test names, or all."""
    named = os.environ.get("DENSE_ATTN_CUDA_HEAD_DIMS")
    return named.split(",") if named else HEAD_DIMS


def jobs() -> Iterator[tuple[str, str, list[str]]]:
    """Each compilation of a kernel: its source, a name of the variant, and the variant's flags."""
    for source in (source for sources in KERNELS.values() for source in sources):
        flags = [*FLAGS, *SOURCE_FLAGS.get(source, ())]
        if source == CHOOSER and head_dims() != HEAD_DIMS:
            flags.append(f"-DDENSE_ATTN_HEAD_DIMS(f)={' '.join(f'f({x})' for x in head_dims())}")
        if source not in OF_A_HEAD_DIM:
            yield source, "all", flags
            continue
        for head_dim in head_dims():
            name = f"head_dim_{head_dim}"
            yield source, name, [*flags, f"-DDENSE_ATTN_HEAD_DIM={head_dim}"]


def bindings() -> list[str]:
    """The sources that see torch."""
    return [f"bindings/cuda/{name}.cpp" for name in ("module", *KERNELS)]


def digest(nvcc: str, code: Sequence[str]) -> str:
    """A short name of a library: of its sources, the compiler, the architectures and the head dims.
    The library knows it, and a verdict on its kernels belongs to it.
    """
    said = subprocess.run([nvcc, "--version"], capture_output=True, check=False).stdout
    parts = [said, *(option.encode() for option in (*code, *map(str, head_dims())))]
    for path in sorted(path for files in _MADE_OF for path in _ROOT.glob(files)):
        parts += [path.relative_to(_ROOT).as_posix().encode(), path.read_bytes()]
    return sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()[:16]
