"""The table of CUDA kernels: `python -m dense_attn.benchmarks.compiled.cuda_table --json FILE`, the
second half of `make kernels`.

Every kernel of the CUDA library, built as it ships; no GPU is needed and nothing is run.
A row says what ptxas made of a kernel and, for sm_80 and sm_90, what a warp executes in a round of
its longest loop: for each number of products on tensor cores that a way through it has, the fewest
and the most instructions of such a way.

    --json FILE      the table of Triton kernels, whose part "cuda" is written anew
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from runpy import run_path
from typing import Any

from dense_attn import _command, _files
from dense_attn._backends.contract import MODULATIONS

from . import counts, kernel_table, sass
from .ahead_of_time import look_into

MODULE = "dense_attn.benchmarks.compiled.cuda_table"
ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90", "sm_100")
# Bytes that kernels may spill, by the largest head dim: those of gradients hold two products' sums
# at once, and spill outside of their products.
SPILLS = {
    "row_fwd": {160: 0, 256: 24},
    "fwd": {96: 0, 128: 32, 256: 24},
    "bwd": {128: 56, 160: 112, 256: 0},
}
Row = dict[str, Any]
_DIGITS = 16
_USAGE = re.compile(
    r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", re.MULTILINE
)
_TYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32", "double": "float64"}


def main(argv: Sequence[str] | None = None) -> int:
    """Build, print what breaks a rule, write; 1 if a rule is broken."""
    parser = argparse.ArgumentParser(f"python -m {MODULE}", description="Count CUDA kernels.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the table")
    arguments = parser.parse_args(argv)
    _files.check(arguments.json)
    table = kernel_table.read(arguments.json)
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(build(Path(folder), TARGETS))
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    header = {"date": date, "nvcc": nvcc_release(), "sources": hashes()}
    kernel_table.write(arguments.json, table | {"cuda": header, "cuda_rows": rows})
    broken = [f"{name(row)}: {fault}" for row in rows for fault in faults(row)]
    print("\n".join([*broken, f"{len(rows)} CUDA kernels, {len(broken)} faults"]))
    return 1 if broken else 0


def build(folder: Path, targets: Iterable[str], head_dims: str = "") -> Path:
    """The CUDA library of this checkout, built into a folder for some devices: all of it, or the
    classes of head dims that a text like "40,64" names.
    """
    archs = ",".join(target.removeprefix("sm_") for target in targets)
    wanted = {"DENSE_ATTN_CUDA": "1", "DENSE_ATTN_CUDA_ARCHS": archs, "DENSE_ATTN_CPU_KERNELS": "0"}
    wanted["DENSE_ATTN_CUDA_HEAD_DIMS"] = head_dims
    places = ["--build-temp", str(folder / "temp"), "--build-lib", str(folder)]
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *places]
    options = {"capture_output": True, "text": True, "errors": "replace", "check": False}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | wanted, **options)
    library = folder / "dense_attn" / "_CUDA.so"
    if done.returncode or not library.exists():
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    return library


def rows_of(library: Path) -> list[Row]:
    """A row for each kernel and device of a library."""
    with tempfile.TemporaryDirectory() as folder:
        look_into(library, "--extract-elf", "all", cwd=folder)
        cubins = sorted(Path(folder).glob("*.cubin"))
        if not cubins:
            raise ValueError(f"a library must hold cubins, got none in {library}")
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = [row for rows in pool.map(_rows_of_cubin, cubins) for row in rows]
    return sorted(found, key=name)


def _rows_of_cubin(cubin: Path) -> list[Row]:
    target = re.search(r"sm_\d+", cubin.name)[0]
    functions = {}
    if target in counts.RATES:
        code = look_into(cubin, "--print-code", tool="nvdisasm")
        functions = {function.name: function for function in sass.parse(code)}
    rows = []
    for symbol, *numbers in _USAGE.findall(look_into(cubin, "--dump-resource-usage")):
        kernel, arguments, head_dim = named(symbol)
        row = {"kernel": kernel, "arguments": arguments, "head_dim": head_dim, "target": target}
        registers, stack, shared, local = map(int, numbers)
        row |= {"registers": registers, "spills": stack + local, "shared": shared}
        rows.append(row | (_counted(functions[symbol]) if symbol in functions else {}))
    return rows


def named(symbol: str) -> tuple[str, list[str], int | None]:
    """A kernel's name, its template arguments in the project's words, its class of head dims."""
    words = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+_kernel)(?:<(.*?)>)?\(", words)
    if found is None:
        raise ValueError(f"a kernel must have a name, got {symbol!r}")
    arguments = [_word(x.strip()) for x in (found[2] or "").split(",") if x.strip()]
    head_dim = re.search(r"head_dim_(\d+)", words)
    return found[1], arguments, int(head_dim[1]) if head_dim else None


def nvcc_release() -> str:
    """The compiler's release."""
    nvcc = run_path(str(ROOT / "bindings" / "cuda" / "build.py"))["nvcc"]
    command = [nvcc(), "--version"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return said.partition("release ")[2].partition(",")[0]


def hashes() -> dict[str, str]:
    """The first digits of each source's and header's sha256, by its path below `csrc`."""
    csrc = ROOT / "csrc"
    files = [*csrc.glob("*.h"), *csrc.glob("common/*.h"), *(csrc / "cuda").rglob("*.[ch]*")]
    return {
        path.relative_to(csrc).as_posix(): sha256(path.read_bytes()).hexdigest()[:_DIGITS]
        for path in sorted(files)
    }


def _word(argument: str) -> str:
    """A template argument: the name of a type or of a modulation, else as it stands."""
    modulation = re.fullmatch(r"\(Modulation\)(\d)", argument)
    return MODULATIONS[int(modulation[1])] if modulation else _TYPES.get(argument, argument)


def _counted(function: sass.Function) -> Row:
    """Instructions of the whole kernel, and of its longest loop the kinds and the rounds."""
    found: Row = {"instructions": sum(len(function.blocks[block]) for block in function.reached)}
    if function.loops:
        longest = max(function.loops, key=lambda loop: _size(function, loop))
        body = [x for block in sorted(longest) for x in function.blocks[block]]
        found["rounds"] = [[n, *ways] for n, ways in function.rounds_of(longest).items()]
        found["kinds"] = counts.count(body)
        found["copy_waits"] = counts.waits(body)[0]
    return found


def _size(function: sass.Function, loop: Iterable[int]) -> int:
    return sum(len(function.blocks[block]) for block in loop)


def name(row: Row) -> str:
    """A row in a few words."""
    dims = [] if row["head_dim"] is None else [f"d {row['head_dim']}"]
    return " ".join([row["kernel"], *row["arguments"], *dims, row["target"]])


def faults(row: Row) -> list[str]:
    """The rules that a row breaks."""
    kind = next((kind for kind in SPILLS if f"attention_{kind}" in row["kernel"]), None)
    allowed = 0
    if kind is not None:
        allowed = next(most for d, most in SPILLS[kind].items() if row["head_dim"] <= d)
    return [f"{row['spills']} bytes spilled"] if row["spills"] > allowed else []


if __name__ == "__main__":
    sys.exit(_command.run("cuda.table", main))
