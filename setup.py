"""Builds `dense_attn/_C.so`: each CPU kernel once per instruction set, and the stable-ABI binding.
With nvcc and a torch for CUDA, `dense_attn/_CUDA.so` too, as `bindings/cuda/build.py` says.

`DENSE_ATTN_CPU_KERNELS=0` builds the package without the first, as a machine without a compiler
does, `DENSE_ATTN_CUDA=0` without the second, `=1` either on any machine; `DENSE_ATTN_SANITIZE=1`
with sanitizers.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import setuptools
from setuptools import Command, Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, PlatformError

OLDEST_SETUPTOOLS = 77  # the first that reads pyproject.toml's licence
OLDEST_TORCH = (2, 11)
STABLE_ABI = "0x020b000000000000"  # of this torch
T = TypeVar("T")
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
CPU, CUDA = (runpy.run_path(f"bindings/{folder}build.py") for folder in ("", "cuda/"))
WITHOUT = CPU["WITHOUT"]


def wants_cpu() -> bool:
    """Whether the CPU library is built: as it is asked for, else where a compiler is; one that
    cannot make it is an error.
    """
    if not switch("DENSE_ATTN_CPU_KERNELS", True):
        return False
    if switch("DENSE_ATTN_CPU_KERNELS", False) or CPU["is_there"]():
        return True
    print(f"warning: {CPU['NONE']}", file=sys.stderr)
    return False


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
        self._named()  # refuses a name that setuptools would fall over
        if any(ext.name.endswith("_CUDA") for ext in self.extensions):
            self._nvcc()  # refused before anything is compiled
        super().run()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compiler = CPU["compiler"]()
        if not ext.name.endswith("_CUDA"):
            _checked(CPU["check"], compiler)
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
        # The sanitizers' own optimisation level comes last and so wins: at -O3 they take minutes.
        last = CPU["SANITIZE_FLAGS"] if SANITIZED else []
        commands = [
            (source, folder, [*compiler, *CPU["FLAGS"], *flags, *last, "-Icsrc"])
            for source, folder, flags in CPU["jobs"](stable_abi)
        ]
        said = f"the CPU kernels did not compile, as the compiler says above ({{}}); {WITHOUT}"
        linker = [*compiler, *CPU["FLAGS"], *last, *CPU["LINK_FLAGS"], *folders]
        if not self._build(ext, commands, linker, said).is_file():
            needed, advice = CPU["NEEDED"], CPU["ADVICE"]
            raise PlatformError(f"{needed}, got one that writes no file: {advice}; {WITHOUT}")

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
        return _checked(CUDA["nvcc"]), _checked(CUDA["code"], text("DENSE_ATTN_CUDA_ARCHS"))

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

    def _compile(self, source: str, folder: str, command: list[str]) -> str:
        target = Path(self.build_temp, folder, source).with_suffix(".o")
        target.parent.mkdir(parents=True, exist_ok=True)
        self.spawn([*command, "-c", source, "-o", str(target)])
        return str(target)

    def _named(self) -> list[str]:
        """The compiler that CXX names, if it does."""
        return _checked(CPU["named"])


def wheel_command() -> type[Command]:
    """The command that makes a wheel, for every Python 3: the libraries know none."""
    from setuptools.command.bdist_wheel import bdist_wheel  # old versions have none

    class BdistWheel(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return "py3", "none", super().get_tag()[2]

    return BdistWheel


def _checked(find: Callable[..., T], *arguments: Any) -> T:
    """A result of a plan's function, whose refusal ends the build."""
    try:
        return find(*arguments)
    except (CPU["CompilerError"], CUDA["NvccError"]) as error:
        raise PlatformError(str(error)) from None


def _headers(*more: str) -> list[str]:
    folders = ("csrc/*.h", "csrc/common/*.h", "bindings/*.h", *more)
    return [*(file for folder in folders for file in glob(folder)), CONTRACT]


def cpu_extension() -> list[Extension]:
    """The library of the CPU's kernels, where it is wanted."""
    depends = _headers("csrc/cpu/*.h", "bindings/hidden.map")
    return [Extension("dense_attn._C", CPU["SOURCES"], depends=depends)] if wants_cpu() else []


def cuda_extension() -> list[Extension]:
    """The library of CUDA's kernels, where it is wanted."""
    sources = [*CUDA["bindings"](), *(source for source, *_ in CUDA["jobs"]())]
    depends = _headers("csrc/cuda/*.*", "csrc/cuda/*/*.*", "bindings/cuda/*.h")
    how = {"depends": depends, "optional": not switch("DENSE_ATTN_CUDA", False)}
    return [Extension("dense_attn._CUDA", sorted(set(sources)), **how)] if wants_cuda() else []


DATA = ["*.js", "*.md", "*.png", "*.safetensors", "*.toml", "*/*.json", "py.typed", "web/docs/*.md"]
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
    package_data={"": DATA},
    ext_modules=[*cpu_extension(), *cuda_extension()],
    cmdclass={"bdist_wheel": wheel_command(), "build_ext": BuildExt},
)
