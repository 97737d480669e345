"""The library as `make gpu` builds it: `gpu_build.py python | cpu`.

The Python part is copied as setup.py lays it out, which needs no setuptools; the CPU kernels, which
no kernel of a GPU needs, come into their place whole when they are compiled.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from importlib import metadata
from pathlib import Path

from gpu_steps import BUILD, ROOT, SKIPPED

LIBRARY, WHEELS = BUILD / "lib", BUILD / "site"
BESIDE = ("benchmarks", "examples", "triton_kernels")  # in the checkout; inside of the package
OLDEST_SETUPTOOLS = 77
NATIVE = Path("dense_attn", "_C.so")


def build_python() -> int:
    """Copy the package and what lies beside it in the checkout."""
    left_out = shutil.ignore_patterns("__pycache__", "*.so", "*.py[cod]")
    package = LIBRARY / "dense_attn"
    shutil.rmtree(LIBRARY, ignore_errors=True)
    shutil.copytree(ROOT / "dense_attn", package, ignore=left_out)
    for folder in BESIDE:
        shutil.copytree(ROOT / folder, package / folder, ignore=left_out)
    return 0


def build_cpu() -> int:
    """Compile the CPU kernels behind everything else, or say what is missing for it."""
    compiler = (os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0]
    if shutil.which(compiler) is None:
        return _skipped("no C++ compiler")
    try:
        version = metadata.version("setuptools")
    except metadata.PackageNotFoundError:
        return _skipped("no setuptools")
    if int(re.match(r"\d*", version)[0] or 0) < OLDEST_SETUPTOOLS:
        return _skipped(f"setuptools {version}, and {OLDEST_SETUPTOOLS} is needed")
    folders = ["--build-temp", str(BUILD / "temp"), "--build-lib", str(BUILD / "native")]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *folders]
    behind = {"preexec_fn": lambda: os.nice(10)}
    code = subprocess.run(command, cwd=ROOT, check=False, **behind).returncode
    if code == 0:
        os.replace(BUILD / "native" / NATIVE, LIBRARY / NATIVE)
    return code


def _skipped(why: str) -> int:
    print(f"{why}: the library runs without its CPU kernels")
    return SKIPPED


if __name__ == "__main__":
    sys.exit({"python": build_python, "cpu": build_cpu}[sys.argv[1]]())
