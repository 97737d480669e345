"""The library as `make gpu` builds it: `gpu_build.py python | cuda | cpu`.

The Python part is copied as setup.py lays it out, which needs no setuptools; the CUDA kernels, for
the GPU that is there, and the CPU kernels, which no kernel of a GPU needs, come into their place
whole when they are compiled.
"""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from gpu_steps import BUILD, ROOT, SKIPPED

LIBRARY, WHEELS = BUILD / "lib", BUILD / "site"
BESIDE = ("benchmarks", "examples", "triton_kernels")  # in the checkout; inside of the package
OLDEST_SETUPTOOLS = 77
CPU, CUDA = Path("dense_attn", "_C.so"), Path("dense_attn", "_CUDA.so")
TOOLKIT = Path("/usr/local/cuda")  # where it lies, if nothing else names it
ARCH = "import torch; print('{}{}'.format(*torch.cuda.get_device_capability()))"


def build_python() -> int:
    """Copy the package and what lies beside it in the checkout."""
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "*.py[cod]")
    package = LIBRARY / "dense_attn"
    shutil.rmtree(LIBRARY, ignore_errors=True)
    shutil.copytree(ROOT / "dense_attn", package, ignore=left_out)
    for folder in BESIDE:
        shutil.copytree(ROOT / folder, package / folder, ignore=left_out)
    return 0


def build_cuda() -> int:
    """Compile the CUDA kernels for this machine's GPU, or say what is missing for it; in a dry run,
    look at what compiles them alone.
    """
    if not shutil.which("nvcc") and (TOOLKIT / "bin" / "nvcc").is_file():
        os.environ.setdefault("CUDA_HOME", str(TOOLKIT))
    plan = runpy.run_path(str(ROOT / "bindings" / "cuda" / "build.py"))
    try:
        nvcc = plan["nvcc"]()
    except plan["NvccError"] as error:
        print(error)
        return SKIPPED
    if missing := _missing():
        return _skipped(missing, "CUDA")
    if "--dry-run" in sys.argv:
        print(nvcc)
        return 0
    arch = subprocess.run([sys.executable, "-c", ARCH], stdout=subprocess.PIPE, text=True)
    if arch.returncode:
        return arch.returncode
    print(nvcc, "for", arch.stdout.strip(), flush=True)
    wanted = {"DENSE_ATTN_CPU_KERNELS": "0", "DENSE_ATTN_CUDA": "1"}
    return _compile(CUDA, wanted | {"DENSE_ATTN_CUDA_ARCHS": arch.stdout.strip()})


def build_cpu() -> int:
    """Compile the CPU kernels behind everything else, or say what is missing for it."""
    if missing := _missing():
        return _skipped(missing, "CPU")
    return _compile(CPU, {"DENSE_ATTN_CPU_KERNELS": "1", "DENSE_ATTN_CUDA": "0"}, nice=10)


def _missing() -> str:
    """The first thing that setup.py needs and this machine lacks, "" if nothing."""
    plan = runpy.run_path(str(ROOT / "bindings" / "build.py"))
    if shutil.which(plan["compiler"]()[0]) is None:
        return "no C++ compiler"
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        return "no setuptools"
    if int(re.match(r"\d*", version)[0] or 0) < OLDEST_SETUPTOOLS:
        return f"setuptools {version}, and {OLDEST_SETUPTOOLS} is needed"
    return ""


def _compile(library: Path, wanted: dict[str, str], nice: int = 0) -> int:
    """The exit code of setup.py, whose library then comes into its place."""
    folders = ["--build-temp", str(BUILD / "temp"), "--build-lib", str(BUILD / "native")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    how = {"env": os.environ | wanted, "preexec_fn": lambda: os.nice(nice)}
    code = subprocess.run(command, cwd=ROOT, check=False, **how).returncode
    if code == 0:
        os.replace(BUILD / "native" / library, LIBRARY / library)
    return code


def _skipped(why: str, kernels: str) -> int:
    print(f"{why}: the library runs without its {kernels} kernels")
    return SKIPPED


if __name__ == "__main__":
    sys.exit({"python": build_python, "cuda": build_cuda, "cpu": build_cpu}[sys.argv[1]]())
