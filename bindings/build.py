"""The CPU library's sources and the compiler's options, for setup.py and `make gpu`.

Knows the standard library alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Sequence

WITHOUT = (
    "without CPU kernels the library still runs, on its PyTorch reference and, on GPUs, on Triton: "
    "DENSE_ATTN_CPU_KERNELS=0 pip install --no-build-isolation ."
)
NEEDED, ADVICE = (
    "the CPU kernels must have a C++20 compiler",
    "install g++ 12 or newer, or name a compiler in CXX",
)
NONE = (
    "dense_attn is built without its CPU kernels, as there is no C++ compiler: the PyTorch "
    "reference runs, and Triton on GPUs; for the kernels install g++ 12 or newer and build again"
)
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
PROBE = """
#include <type_traits>
template <typename T> requires std::is_integral_v<T> T f(T x);
#if !__has_builtin(__builtin_shufflevector)
#error no __builtin_shufflevector, which g++ has from 12 on
#endif
"""
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", *WARNINGS]
KERNEL_FLAGS = [
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-exceptions",
    "-fno-rtti",
]
SANITIZE_FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
ISAS = {"portable": []}  # the names that csrc/cpu/dispatch.cpp knows
PLATFORM = sysconfig.get_platform()  # of the library; a cross build names it as CPython's do
if PLATFORM.endswith(("x86_64", "amd64")):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16}
    ISAS |= {"amx_bf16": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]}

KERNELS = ["csrc/cpu/layout_attention.cpp", "csrc/cpu/sega.cpp", "csrc/cpu/reversible.cpp"]
# Thresholds and grid steps must be the same bits on every device, so no product melts into a sum.
SOURCE_FLAGS = {
    source: ["-ffp-contract=off"] for source in ("csrc/cpu/sega.cpp", "csrc/cpu/reversible.cpp")
}
DISPATCH = ["csrc/cpu/dispatch.cpp"]
BINDINGS = [
    "bindings/module.cpp",
    "bindings/layout_attention.cpp",
    "bindings/sega.cpp",
    "bindings/reversible.cpp",
]
# The library runs on systems older than this one: manylinux.cpp has what they lack, and no symbol
# of it may reach another library.
OLD_SYSTEMS = ["bindings/manylinux.cpp"] if PLATFORM.startswith("linux") else []
LINK_FLAGS = ["-Wl,--wrap=log", "-Wl,--version-script=bindings/hidden.map"] if OLD_SYSTEMS else []
SOURCES = [*KERNELS, *DISPATCH, *BINDINGS, *OLD_SYSTEMS]


class CompilerError(Exception):
    """No compiler that can make the kernels; the message is one sentence."""


def named() -> list[str]:
    """The compiler that CXX names, with its options; empty if it names none."""
    words = os.environ.get("CXX", "")
    try:
        return shlex.split(words)
    except ValueError as error:
        raise CompilerError(f"CXX must name a compiler, got {words!r}: {error}") from None


def compiler() -> list[str]:
    """The compiler that CXX names, else Python's own or the first usual one that is there."""
    python_s = shlex.split(sysconfig.get_config_var("CXX") or "")[:1]
    usual = [*python_s, "c++", "g++"]
    return named() or [next(filter(shutil.which, usual), usual[0])]


def is_there() -> bool:
    """Whether CXX names a compiler, rightly or not, or a usual one is there."""
    return bool(os.environ.get("CXX", "").strip()) or shutil.which(compiler()[0]) is not None


def check(command: Sequence[str]) -> None:
    """Refuse a compiler of which every source would complain, before it sees them."""
    probe = [*command, *FLAGS, "-x", "c++", "-fsyntax-only", "-"]
    try:
        done = subprocess.run(probe, input=PROBE, capture_output=True, text=True, check=False)
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
    except OSError as error:
        done, lines = None, [str(error.strerror)]
    if done is None or done.returncode:
        # Warnings may stand before it.
        said = next((line for line in lines if "error" in line), lines[0])
        raise CompilerError(f"{NEEDED}, got {command[0]!r} ({said}): {ADVICE}; {WITHOUT}")


def jobs(stable_abi: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each compilation: its source, a name of the variant, and the variant's flags; those of the
    stable ABI go to the sources that see torch.
    """
    for source in BINDINGS:
        yield source, "host", [*stable_abi]
    for source in (*DISPATCH, *OLD_SYSTEMS):
        yield source, "host", []
    for isa, flags in ISAS.items():
        defines = [f"-DDENSE_ATTN_ISA={isa}"]
        for source in KERNELS:
            yield source, isa, [*KERNEL_FLAGS, *flags, *defines, *SOURCE_FLAGS.get(source, ())]
