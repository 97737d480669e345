"""The machine in C++, compiled on first use, and its names."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent / "machine"
BUILD = Path(__file__).resolve().parents[3] / "build" / "ptx"
FLAGS = (
    "-std=c++20",
    "-O2",
    "-fvisibility=hidden",
    "-march=native",
    "-ffp-contract=off",
    "-fPIC",
    "-Wall",
    "-Wextra",
)


class Options(ctypes.Structure):
    """A launch, as the machine has it."""

    _fields_ = (
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("order", ctypes.c_int32),
        ("harsh", ctypes.c_int32),
        ("seed", ctypes.c_uint32),
        ("num_registers", ctypes.c_int32),
        ("num_params", ctypes.c_int32),
        ("local_bytes", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("num_storages", ctypes.c_int32),
        ("most", ctypes.c_uint64),
        ("max_registers", ctypes.c_int32),
    )


@cache
def library() -> ctypes.CDLL:
    """The machine; a compiler is started where these sources have not been compiled yet."""
    files = sorted(SOURCES.iterdir())
    processor = Path("/proc/cpuinfo")
    seen = processor.read_text().split("flags", 2)[1] if processor.exists() else ""
    state = [
        *(file.read_bytes() for file in files),
        " ".join((*FLAGS, seen.split("\n")[0])).encode(),
    ]
    path = BUILD / f"machine-{hashlib.sha256(b'|'.join(state)).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with (BUILD / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one run take what one of them compiles
            if not path.exists():
                _compile([file for file in files if file.suffix == ".cpp"], path)
    loaded = ctypes.CDLL(str(path))
    loaded.ptx_names.restype = ctypes.c_char_p
    return loaded


def _compile(files: list[Path], path: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        raise FileNotFoundError(f"CXX must be a C++ compiler, got {compiler[0]!r}")
    with tempfile.TemporaryDirectory(dir=BUILD) as folder:
        objects = [Path(folder) / f"{file.stem}.o" for file in files]
        running = [
            subprocess.Popen([*compiler, *FLAGS, "-c", str(file), "-o", str(made)])
            for file, made in zip(files, objects)
        ]
        if sum(process.wait() for process in running):  # every one is waited for
            raise OSError("the emulator's machine must compile, see above")
        linked = Path(folder) / path.name
        subprocess.run([*compiler, "-shared", *map(str, objects), "-o", str(linked)], check=True)
        linked.replace(path)


def names(which: int) -> list[str]:
    """The operations, types, modes, flags, spaces or special registers, by their numbers."""
    return library().ptx_names(which).decode().rstrip(",").split(",")
