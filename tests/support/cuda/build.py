"""The CUDA library with the stand-in runtime, its kernels as PTX, compiled on first use: for all
classes of head dims, or for those that DENSE_ATTN_CUDA_HEAD_DIMS names, as "40,64".
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "cuda"
RUNTIME = Path(__file__).with_name("runtime.cpp")
PLAN = runpy.run_path(str(ROOT / "bindings" / "cuda" / "build.py"))
MODULE = "bindings/cuda/module.cpp"
STABLE_ABI = "0x020b000000000000"
PTX = [f"-gencode=arch={PLAN['PTX']},code={PLAN['PTX']}"]


def missing() -> str | None:
    """The reason why the library cannot be compiled here; None if it can."""
    try:
        PLAN["nvcc"]()
    except PLAN["NvccError"] as error:
        return str(error).split(":")[0]
    return None


@cache
def library() -> Path:
    """The library, of these sources; raises OSError where it does not compile."""
    nvcc = PLAN["nvcc"]()
    contract = runpy.run_path(str(ROOT / "dense_attn" / "_backends" / "contract.py"))["DIGEST"]
    stable = (f"-DTORCH_TARGET_VERSION={STABLE_ABI}", f'-DDENSE_ATTN_CONTRACT="{contract}"')
    torch_headers = [f"-isystem{folder}" for folder in include_paths()]
    on_the_cpu = [*PLAN["FLAGS"], *PLAN["BINDING_FLAGS"], *stable, *torch_headers]
    on_the_cpu.append("-DDENSE_ATTN_DEVICE=CPU")
    sources = f'-DDENSE_ATTN_CUDA_SOURCES="{PLAN["digest"](nvcc, PTX)}"'
    own = {MODULE: [*on_the_cpu, sources]}  # nothing else is compiled again for it
    jobs = [(nvcc, name, "host", own.get(name, on_the_cpu)) for name in PLAN["bindings"]()]
    jobs.append((nvcc, str(RUNTIME.relative_to(ROOT)), "host", [*PLAN["FLAGS"]]))
    for source, variant, options in PLAN["jobs"]():
        jobs.append((nvcc, source, variant, [*options, *PTX, "--no-compress"]))
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one run take what one of them compiles
        objects = list(pool.map(lambda job: _object(*job), jobs))
    path = BUILD / f"cuda-{_digest(*(name.encode() for name in map(str, objects)))}.so"
    if not path.exists():
        # The stand-in is told of every tensor whose memory a binding asks for.
        wrapped = ["-Xlinker", "--wrap=aoti_torch_get_data_ptr", "-cudart=none"]
        folders = [f"-L{folder}" for folder in library_paths()]
        _run([nvcc, "-shared", *map(str, objects), *wrapped, *folders, "-ltorch_cpu"], path)
    return path


def _object(nvcc: str, source: str, variant: str, flags: list[str]) -> Path:
    """A source compiled, found again while neither it nor a header of it has changed."""
    texts = _texts(ROOT / source, {})
    digest = _digest(*(texts[path] for path in sorted(texts)), " ".join(flags).encode())
    path = BUILD / f"{Path(source).stem}-{variant}-{digest}.o"
    if not path.exists():
        _run([nvcc, *flags, "-c", source], path)
    return path


def _texts(path: Path, found: dict[Path, bytes]) -> dict[Path, bytes]:
    """A source and the headers of ours that it includes, however deep."""
    found[path] = path.read_bytes()
    for name in re.findall(rb'^#include "(.+)"', found[path], re.M):
        folders = (path.parent, ROOT / "csrc", ROOT / "bindings")
        header = next((x for folder in folders if (x := folder / name.decode()).is_file()), None)
        if header is not None and header not in found:
            _texts(header, found)
    return found


def _run(command: list[str], path: Path) -> None:
    part = path.with_name(f"{os.getpid()}-{path.name}")
    done = subprocess.run(
        [*command, "-o", str(part)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise OSError(f"the CUDA code must compile, got {done.stderr[-4000:] or done.stdout}")
    part.replace(path)


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]
