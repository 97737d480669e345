"""Builds `dense_attn/_C.so`: each CPU kernel once per instruction set, and the stable-ABI binding.
With nvcc and a torch for CUDA, `dense_attn/_CUDA.so` too, as `bindings/cuda/build.py` says.

`DENSE_ATTN_CPU_KERNELS=0` builds the package without the first, `DENSE_ATTN_CUDA=0` without the
second and `=1` with it on any machine; `DENSE_ATTN_SANITIZE=1` with sanitizers.
"""

from __future__ import annotations

import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import setuptools
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, PlatformError

OLDEST_SETUPTOOLS = 77  # the first that reads pyproject.toml's licence
OLDEST_TORCH = (2, 11)
STABLE_ABI = "0x020b000000000000"  # of this torch
WITHOUT = (
    "without CPU kernels the library still runs, on its PyTorch reference and, on GPUs, on Triton: "
    "DENSE_ATTN_CPU_KERNELS=0 pip install --no-build-isolation ."
)
NEEDED, ADVICE = (
    "the CPU kernels must have a C++20 compiler",
    "install g++ 12 or newer, or name a compiler in CXX",
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
CXX_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", *WARNINGS]
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
ISAS = {"portable": []}  # the names that csrc/cpu/dispatch.cpp knows
if platform.machine() in ("x86_64", "AMD64"):
    ISAS |= {"avx2": AVX2, "avx512": AVX512, "avx512_bf16": [*AVX512, "-mavx512bf16"]}

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


CONTRACT = "dense_attn/_backends/contract.py"


def contract() -> str:
    """The digest of the schemas that the kernels are compiled for."""
    return runpy.run_path(CONTRACT)["DIGEST"]


ENVIRONMENT = runpy.run_path("dense_attn/_environment.py")
text = ENVIRONMENT["text"]


def switch(name: str, default: bool) -> bool:
    """Whether an environment variable is switched on, as the library reads it."""
    try:
        return ENVIRONMENT["flag"](name, default)
    except ValueError as error:
        sys.exit(str(error))


SANITIZED = switch("DENSE_ATTN_SANITIZE", False)
CUDA = runpy.run_path("bindings/cuda/build.py")


def wants_cuda() -> bool:
    """Whether the CUDA library is built: as it is asked for, else where nvcc and torch are for it;
    a GPU need not be there.
    """
    return switch("DENSE_ATTN_CUDA", False) or (
        switch("DENSE_ATTN_CUDA", True) and _torch_is_for_cuda() and _nvcc_is_there()
    )


def _torch_is_for_cuda() -> bool:
    spec = find_spec("torch")
    version = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    return bool(version and version.is_file() and runpy.run_path(str(version)).get("cuda"))


def _nvcc_is_there() -> bool:
    try:
        CUDA["nvcc"]()
    except CUDA["NvccError"]:
        return False
    return True


def check_setuptools() -> None:
    """End with a sentence where setuptools is too old to read pyproject.toml."""
    if int(re.match(r"\d*", setuptools.__version__)[0] or OLDEST_SETUPTOOLS) < OLDEST_SETUPTOOLS:
        needed = f"setuptools {OLDEST_SETUPTOOLS} or newer, got {setuptools.__version__}"
        sys.exit(
            f"dense_attn must be built with {needed}: pip install 'setuptools>={OLDEST_SETUPTOOLS}'"
        )


class BuildExt(build_ext):
    """Compiles every kernel for every instruction set; links one library that knows no Python."""

    def run(self) -> None:
        self._compiler()  # refuses a name that setuptools would fall over
        if any(ext.name.endswith("_CUDA") for ext in self.extensions):
            self._nvcc()  # refused before anything is compiled
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        if not ext.name.endswith("_CUDA"):
            self._check_compiler()
        include_paths, library_paths = self._torch_folders()
        stable_abi = [
            f"-DTORCH_TARGET_VERSION={STABLE_ABI}",
            f'-DDENSE_ATTN_CONTRACT="{contract()}"',
            "-Ibindings",
            *(f"-isystem{p}" for p in include_paths),
        ]
        folders = [f"-L{folder}" for folder in library_paths]
        if ext.name.endswith("_CUDA"):
            self._build_cuda(ext, stable_abi, folders)
            return
        jobs = [(source, "host", stable_abi) for source in BINDINGS] + [
            (source, "host", []) for source in DISPATCH
        ]
        for isa, flags in ISAS.items():
            defines = [f"-DDENSE_ATTN_ISA={isa}"]
            jobs += [
                (source, isa, [*KERNEL_FLAGS, *flags, *defines, *SOURCE_FLAGS.get(source, ())])
                for source in KERNELS
            ]
        commands = [
            # The sanitizers' own optimisation level comes last and so wins: at -O3 they take
            # minutes.
            (source, folder, [*self._compiler(flags), "-Icsrc"])
            for source, folder, flags in jobs
        ]
        said = f"the CPU kernels did not compile, as the compiler says above ({{}}); {WITHOUT}"
        library = self._build(ext, commands, [*self._compiler(), *folders], said)
        if not library.is_file():
            raise PlatformError(f"{NEEDED}, got one that writes no file: {ADVICE}; {WITHOUT}")

    def _build_cuda(self, ext: Extension, stable_abi: list[str], folders: list[str]) -> None:
        nvcc, code = self._nvcc()
        named = self._named()
        compiler = [nvcc, *(["-ccbin", named[0]] if len(named) == 1 else [])]
        sources = f'-DDENSE_ATTN_CUDA_SOURCES="{CUDA["digest"](nvcc, code)}"'
        host = [*compiler, *CUDA["FLAGS"], *CUDA["BINDING_FLAGS"], *stable_abi, sources]
        commands = [
            (source, "cuda", [*host, "-DDENSE_ATTN_DEVICE=CUDA"]) for source in CUDA["bindings"]()
        ]
        commands += [
            (source, f"cuda/{name}", [*compiler, *flags, *code])
            for source, name, flags in CUDA["jobs"]()
        ]
        without = CUDA["WITHOUT"]
        said = f"the CUDA kernels did not compile, as nvcc says above ({{}}); {without}"
        # nvcc links its runtime statically.
        self._build(ext, commands, [*compiler, "-cudart=static", *folders], said)

    def _nvcc(self) -> tuple[str, list[str]]:
        """nvcc, and its options for the architectures."""
        try:
            return CUDA["nvcc"](), CUDA["code"](text("DENSE_ATTN_CUDA_ARCHS"))
        except CUDA["NvccError"] as error:
            raise PlatformError(str(error)) from None

    def _build(
        self,
        ext: Extension,
        commands: list[tuple[str, str, list[str]]],
        linker: list[str],
        said: str,
    ) -> Path:
        """The library of an extension: its sources compiled side by side and linked."""
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        pool = ThreadPoolExecutor(os.cpu_count())
        try:
            objects = list(pool.map(lambda job: self._compile(*job), commands))
            self.spawn([*linker, "-shared", *objects, "-ltorch_cpu", "-o", str(library)])
        except BaseError as error:
            pool.shutdown(cancel_futures=True)  # so that what is said last stands last
            raise PlatformError(said.format(error)) from None
        finally:
            pool.shutdown()
        return library

    def _torch_folders(self) -> tuple[list[str], list[str]]:
        """Where torch's headers and its libraries are."""
        oldest = ".".join(map(str, OLDEST_TORCH))
        needed = f"the CPU kernels must be built where torch {oldest} or newer is"
        try:
            import torch
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise PlatformError(f"{needed}, got {error}: pip install torch; {WITHOUT}") from None
        if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < OLDEST_TORCH:
            raise PlatformError(
                f"{needed}, got {torch.__version__}: pip install --upgrade torch; {WITHOUT}"
            )
        if not any(Path(folder, "torch/csrc/stable").is_dir() for folder in include_paths()):
            where = ", ".join(include_paths())
            raise PlatformError(
                f"{needed} with its headers, got none in {where}: pip install torch; {WITHOUT}"
            )
        return include_paths(), library_paths()

    def _check_compiler(self) -> None:
        """Refuse a compiler of which every source would complain, before it sees them."""
        command = [*self._compiler(), "-x", "c++", "-fsyntax-only", "-"]
        try:
            done = subprocess.run(command, input=PROBE, capture_output=True, text=True, check=False)
            lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        except OSError as error:
            done, lines = None, [str(error.strerror)]
        if done is None or done.returncode:
            # Warnings may stand before it.
            said = next((line for line in lines if "error" in line), lines[0])
            got = f"got {command[0]!r} ({said})"
            raise PlatformError(f"{NEEDED}, {got}: {ADVICE}; {WITHOUT}")

    def _compile(self, source: str, folder: str, command: list[str]) -> str:
        target = Path(self.build_temp, folder, source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*command, "-c", source, "-o", str(target)])
        return str(target)

    def _named(self) -> list[str]:
        """The compiler that CXX names, if it does."""
        named = os.environ.get("CXX", "")
        try:
            return shlex.split(named)
        except ValueError as error:
            raise PlatformError(f"CXX must name a compiler, got {named!r}: {error}") from None

    def _compiler(self, flags: list[str] = ()) -> list[str]:
        usual = sysconfig.get_config_var("CXX") or "c++"
        command = self._named() or shlex.split(usual)[:1]
        return [*command, *CXX_FLAGS, *flags, *(SANITIZE_FLAGS if SANITIZED else [])]


def _headers(*more: str) -> list[str]:
    folders = ("csrc/*.h", "csrc/common/*.h", "bindings/*.h", *more)
    return [*(file for folder in folders for file in glob(folder)), CONTRACT]


def cpu_extension() -> list[Extension]:
    """The library of the CPU's kernels, unless it is not wanted."""
    if not switch("DENSE_ATTN_CPU_KERNELS", True):
        return []
    sources = [*KERNELS, *DISPATCH, *BINDINGS]
    return [Extension("dense_attn._C", sources, depends=_headers("csrc/cpu/*.h"))]


def cuda_extension() -> list[Extension]:
    """The library of CUDA's kernels, where it is wanted."""
    sources = [*CUDA["bindings"](), *(source for source, *_ in CUDA["jobs"]())]
    depends = _headers("csrc/cuda/*.*", "csrc/cuda/*/*.*", "bindings/cuda/*.h")
    how = {"depends": depends, "optional": not switch("DENSE_ATTN_CUDA", False)}
    return [Extension("dense_attn._CUDA", sorted(set(sources)), **how)] if wants_cuda() else []


# Folders that are installed inside of the package.
BESIDE = ("benchmarks", "examples", "triton_kernels")

check_setuptools()
setup(
    packages=[
        *find_packages(include=["dense_attn", "dense_attn.*"]),
        *(
            f"dense_attn.{name}"
            for folder in BESIDE
            for name in find_packages(include=[folder, f"{folder}.*"])
        ),
    ],
    package_dir={f"dense_attn.{folder}": folder for folder in BESIDE},
    # MANIFEST.in names what a source distribution holds, pictures for the README too
    include_package_data=False,
    package_data={
        "": "*.js *.md *.png *.safetensors *.toml */*.json py.typed web/docs/*.md".split(),
    },
    ext_modules=[*cpu_extension(), *cuda_extension()],
    cmdclass={"build_ext": BuildExt},
)
