"""Builds `dense_attn/_C.so`: each CPU kernel once per instruction set, and the stable-ABI binding."""

from __future__ import annotations

import os
import platform
import runpy
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

STABLE_ABI = "0x020b000000000000"  # torch 2.11
WARNINGS = [
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-ignored-attributes",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
CXX_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", *WARNINGS]
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]
SANITIZE_FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {"portable": []}  # the names that csrc/cpu/dispatch.cpp knows
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

KERNELS = ["csrc/cpu/layout_attention.cpp", "csrc/cpu/sega.cpp", "csrc/cpu/reversible.cpp"]
# Thresholds and grid steps must be the same bits on every device, so no product melts into a sum.
SOURCE_FLAGS = {source: ["-ffp-contract=off"] for source in ("csrc/cpu/sega.cpp", "csrc/cpu/reversible.cpp")}
DISPATCH = ["csrc/cpu/dispatch.cpp"]
BINDINGS = [
    "bindings/module.cpp",
    "bindings/layout_attention.cpp",
    "bindings/sega.cpp",
    "bindings/reversible.cpp",
]

SANITIZED = runpy.run_path("dense_attn/_environment.py")["flag"]("DENSE_ATTN_SANITIZE")


class BuildExt(build_ext):
    """Compiles every kernel for every instruction set, side by side, and links one library that knows no Python."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        stable_abi = [f"-DTORCH_TARGET_VERSION={STABLE_ABI}", "-Ibindings", *(f"-isystem{p}" for p in include_paths())]
        jobs = [(source, "host", stable_abi) for source in BINDINGS] + [(source, "host", []) for source in DISPATCH]
        for isa, flags in ISAS.items():
            defines = [f"-DDENSE_ATTN_ISA={isa}"]
            jobs += [
                (source, isa, [*KERNEL_FLAGS, *flags, *defines, *SOURCE_FLAGS.get(source, ())]) for source in KERNELS
            ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(lambda job: self._compile(*job), jobs))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        folders = [f"-L{folder}" for folder in library_paths()]
        self.spawn([*self._compiler(), "-shared", *objects, *folders, "-ltorch_cpu", "-o", str(library)])

    def _compile(self, source: str, folder: str, flags: list[str]) -> str:
        target = Path(self.build_temp, folder, source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        # The sanitizers' own optimisation level comes last and so wins: at -O3 they take minutes.
        self.spawn([*self._compiler(flags), "-Icsrc", "-c", source, "-o", str(target)])
        return str(target)

    def _compiler(self, flags: list[str] = ()) -> list[str]:
        sanitize = SANITIZE_FLAGS if SANITIZED else []
        return [self.compiler.compiler_cxx[0], *CXX_FLAGS, *flags, *sanitize]


BESIDE = ("benchmarks", "examples", "triton_kernels")  # folders that are installed inside of the package

setup(
    packages=[
        *find_packages(include=["dense_attn", "dense_attn.*"]),
        *(f"dense_attn.{name}" for folder in BESIDE for name in find_packages(include=[folder, f"{folder}.*"])),
    ],
    package_dir={f"dense_attn.{folder}": folder for folder in BESIDE},
    include_package_data=False,  # MANIFEST.in names what a source distribution holds, pictures for the README too
    package_data={
        "": ["*.md", "*.png", "*.safetensors", "py.typed"],
        "dense_attn.benchmarks": ["results/*.json"],
    },
    ext_modules=[
        Extension(
            "dense_attn._C",
            [*KERNELS, *DISPATCH, *BINDINGS],
            depends=[*glob("csrc/**/*.h", recursive=True), *glob("bindings/*.h")],
        )
    ],
    cmdclass={"build_ext": BuildExt},
)
