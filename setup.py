"""Builds `dense_attn/_C.so`: each CPU kernel once per instruction set, and the stable-ABI binding."""

from __future__ import annotations

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
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
CXX_FLAGS = ["-std=c++20", "-fvisibility=hidden", "-fPIC", *WARNINGS]
KERNEL_FLAGS = ["-O3", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti"]
SANITIZE_FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g1",
]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
ISAS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

KERNELS = ["csrc/cpu/layout_attention.cpp"]
HOST = ["csrc/cpu/dispatch.cpp", "bindings/module.cpp", "bindings/layout_attention.cpp"]


class BuildExt(build_ext):
    """Compiles every kernel for every instruction set, side by side, and links one library without Python."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        sanitize = SANITIZE_FLAGS if os.environ.get("DENSE_ATTN_SANITIZE") == "1" else []
        headers = ["csrc", "bindings", *include_paths()]
        jobs = [(source, f"-DTORCH_TARGET_VERSION={STABLE_ABI}", ["-O2"], "host") for source in HOST]
        jobs += [
            (source, f"-DDENSE_ATTN_ISA={isa}", [*KERNEL_FLAGS, *flags], isa)
            for source in KERNELS
            for isa, flags in ISAS.items()
        ]

        def compile_one(job: tuple[str, str, list[str], str]) -> str:
            source, define, flags, folder = job
            target = Path(self.build_temp, folder, source).with_suffix(".o")
            target.parent.mkdir(parents=True, exist_ok=True)
            include = [f"-I{header}" if folder != "host" or not header.startswith("/") else f"-isystem{header}"
                       for header in (headers if folder == "host" else ["csrc"])]  # fmt: skip
            command = [*self.compiler.compiler_cxx, *CXX_FLAGS, *flags, *sanitize, define, *include]
            self.spawn([*command, "-c", source, "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, jobs))
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        folders = [f"-L{folder}" for folder in library_paths()]
        self.spawn([*self.compiler.compiler_cxx, "-shared", *objects, *sanitize, *folders,
                    "-ltorch_cpu", "-o", str(library)])  # fmt: skip


setup(
    packages=["dense_attn", "dense_attn.benchmarks", "dense_attn.examples"],
    package_dir={"dense_attn.benchmarks": "benchmarks", "dense_attn.examples": "examples"},
    package_data={"dense_attn": ["py.typed"], "dense_attn.examples": ["*.png"]},
    ext_modules=[Extension("dense_attn._C", [*KERNELS, *HOST])],
    cmdclass={"build_ext": BuildExt},
)
