"""`make hub`: the kernels in the layout of Hugging Face's `kernels`, written into build/hub.

build.toml and README.md are for kernel-builder and the Hub; torch-ext/dense_attn is the library's
Python with relative imports; build/torch-stable-abi211-cpu-* has that and the CPU kernels,
build/torch-cuda and build/torch-rocm have that alone, for Triton's kernels.

All of it is made from the tree. Ops are named after the sources' digest, so that several versions
can be loaded beside each other and beside an installed dense_attn.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
NAME = "dense_attn"  # of the package; the kernel's has a dash
VERSION = 0  # the Hub's word for what is not recommended for production yet
STABLE_ABI = "2.11"
NOT_KERNELS = {
    "integrations",
    "demo",
    "verify",
    "__main__",
    "_command",
    "_kernel_report",
    "_pixels",
}
GPUS = ("cuda", "rocm")


def python_files() -> dict[str, Path]:
    """The library's modules by their place in the kernel's package."""
    found = {}
    for place, folder in (("", ROOT / NAME), ("triton_kernels/", ROOT / "triton_kernels")):
        for path in sorted(folder.rglob("*.py")):
            inside = path.relative_to(folder)
            if place or inside.parts[0].removesuffix(".py") not in NOT_KERNELS:
                found[f"{place}{inside.as_posix()}"] = path
    return found


def relative(text: str, place: str, ops: str) -> str:
    """A module's text with relative imports, and its ops under another name."""
    up = "." * len(Path(place).parts)

    def imported(match: re.Match[str]) -> str:
        return f"{match[1]}from {up}{(match[2] or '').removeprefix('.')} import"

    text = re.sub(rf"^(\s*)from {NAME}((?:\.\w+)*) import", imported, text, flags=re.M)
    spec = f'find_spec("{NAME}.triton_kernels")'
    text = text.replace(spec, f'find_spec("{up}triton_kernels", __package__)')
    if place.startswith("_backends/"):
        text = re.sub(rf"\btorch\.ops\.{NAME}", f"torch.ops.{ops}", text)
        text = re.sub(rf'(?<!_version_of\()"{NAME}(_cuda|_triton|::)?(?=["{{])', rf'"{ops}\1', text)
    return text


def digest() -> str:
    """A name for the sources: Python's, the kernels' and their bindings'."""
    kinds = ("csrc/**/*.*", "bindings/*.*")
    paths = [*python_files().values(), *(path for kind in kinds for path in ROOT.glob(kind))]
    whole = sha256()
    for path in sorted(paths):
        whole.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return whole.hexdigest()[:7]


def built(ops: str, folder: Path) -> Path:
    """The CPU library with its ops under a name, compiled into a folder."""
    compiler = os.environ.get("CXX", "c++")
    define = shlex.quote(f"-D{NAME}={ops}")  # bindings name their library by this word
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(folder)]
    temporary = ["--build-temp", str(folder / "objects")]
    environment = os.environ | {"CXX": f"{compiler} {define}", "DENSE_ATTN_CUDA": "0"}
    subprocess.run([*command, *temporary], cwd=ROOT, check=True, env=environment)
    return folder / NAME / "_C.so"


def write_package(folder: Path, ops: str) -> None:
    """Write the Python package."""
    for place, path in python_files().items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(relative(path.read_text("utf-8"), place, ops), "utf-8")
    shutil.copy(ROOT / "LICENSE", folder)


def write_variant(folder: Path, backend: str, ops: str, library: Path | None = None) -> None:
    """Write what the Hub has for a backend: the package, its library if any, and what it is."""
    write_package(folder, ops)
    if library is not None:
        shutil.copy(library, folder / "_C.so")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {
        path.relative_to(folder).as_posix(): b64encode(sha256(path.read_bytes()).digest()).decode()
        for path in files
    }
    metadata = {
        "name": NAME.replace("_", "-"),
        "id": ops,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", "utf-8")


WRITTEN = {"build.toml", "README.md", "torch-ext", "build"}
BUILD = """[general]
name = "dense-attn"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cuda", "rocm"]

[general.hub]
repo-id = ""

[torch-noarch]
pyext = ["py"]
"""
CARD = """---
license: apache-2.0
tags:
- kernels
---

# dense_attn

Layout attention, semantic guidance and reversible sampling for training-free control of diffusion
models: the library `dense_attn` as a kernel of the Hub, written by its `make hub`.

```python
from pathlib import Path
from kernels import get_local_kernel

dense_attn = get_local_kernel(Path("build/hub"), backend="cpu")
out = dense_attn.layout_attention(q, k, v, words, words, 0.5)
```

`build/torch-stable-abi{digits}-cpu-*` has the CPU kernels, for torch {abi} and newer. They are
compiled by `setup.py`, not by kernel-builder, and need the glibc and libstdc++ of the machine that
made them: the Hub asks for those of manylinux_2_28. `build.toml`, `build/torch-cuda` and
`build/torch-rocm` are for Triton's kernels, which no GPU has run. The Python is for 3.10 and newer,
where the Hub asks for 3.9, and needs numpy.
"""


def write(out: Path, ops: str, library: Path) -> None:
    """Write the whole layout into an empty folder."""
    digits = STABLE_ABI.replace(".", "")
    words = {"version": VERSION, "abi": STABLE_ABI, "digits": digits}
    out.mkdir(parents=True)
    (out / "build.toml").write_text(BUILD.format(**words), "utf-8")
    (out / "README.md").write_text(CARD.format(**words), "utf-8")
    write_package(out / "torch-ext" / NAME, ops)
    system = f"{platform.machine()}-{platform.system().lower()}"
    cpu = out / "build" / f"torch-stable-abi{digits}-cpu-{system}"
    write_variant(cpu, "cpu", ops, library)
    for backend in GPUS:
        write_variant(out / "build" / f"torch-{backend}", backend, f"{ops}_{backend}")


def is_free(out: Path) -> bool:
    """Whether a folder is not there, is empty, or has a layout that was written here, alone."""
    if not out.exists():
        return True
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""}
    if names == WRITTEN and (out / "build.toml").is_file():
        return 'name = "dense-attn"' in (out / "build.toml").read_text("utf-8", "replace")
    return not names


def put(out: Path, ops: str, library: Path) -> None:
    """Write the layout beside a folder, then put it in that folder's place."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f"{out.name}-", dir=out.parent) as beside:
        write(Path(beside, "new"), ops, library)
        if out.exists():
            out.rename(Path(beside, "old"))
        Path(beside, "new").rename(out)


def main() -> None:
    """Write build/hub anew."""
    parser = argparse.ArgumentParser(prog="make hub", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "hub")
    parser.add_argument("--library", type=Path, help="a CPU library that is compiled already")
    parser.add_argument("--ops", help="the name of that library's ops")
    given = parser.parse_args()
    if (given.library is None) != (given.ops is None):
        parser.error("--library and --ops must be given both, or none")
    if given.library is not None and not given.library.is_file():
        parser.error(f"--library must be a file, got {given.library}")
    out = given.out.resolve()
    if not is_free(out):
        parser.error(f"--out must be empty, or hold nothing but a layout of {NAME}, got {out}")
    ops = given.ops or f"_{NAME}_{digest()}"
    put(out, ops, given.library or built(ops, out.with_name("hub-library")))
    print(f"wrote {out}, whose ops are torch.ops.{ops}")


if __name__ == "__main__":
    main()
