"""The table of CUDA kernels: `python -m dense_attn.benchmarks.compiled.cuda.table --json FILE`, the
second half of `make kernels`.

Every kernel of the CUDA library, compiled by nvcc as it ships; no GPU is needed and nothing is run.
A row says what ptxas made of a kernel and, for sm_80 and sm_90, what a warp executes in a round of
its longest loop: for each number of products on tensor cores that a way through it has, the fewest
and the most instructions of such a way.

    --json FILE      the table of Triton kernels, whose part "cuda" is written anew
    --target NAME    only for this device; may be repeated
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dense_attn import _command, _files
from dense_attn._backends.contract import MODULATIONS

from .. import counts, kernel_table, sass
from ..ahead_of_time import inspect
from . import plan

MODULE = "dense_attn.benchmarks.compiled.cuda.table"
TARGETS = ("sm_80", "sm_90", "sm_100")
SPILLS = {160: 0, 256: 16}  # bytes that a forward kernel may spill, by the largest head dim
Row = dict[str, Any]
_ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill "
    r"stores, (\d+) bytes spill loads.*?Used (\d+) registers",
    re.S,
)
_SHARED = re.compile(r"(\d+) bytes smem")
_TYPES = {"__half": "float16", "__nv_bfloat16": "bfloat16", "float": "float32", "double": "float64"}


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print what breaks a rule, write; 1 if a rule is broken."""
    parser = argparse.ArgumentParser(f"python -m {MODULE}", description="Compile CUDA kernels.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="the table")
    parser.add_argument("--target", action="append", choices=TARGETS, help="only for this device")
    arguments = parser.parse_args(argv)
    _files.check(arguments.json)
    rows = compile_rows(arguments.target or TARGETS)
    table = kernel_table.read(arguments.json)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    header = {"date": date, "nvcc": plan.version(), "sources": plan.hashes()}
    kernel_table.write(arguments.json, table | {"cuda": header, "cuda_rows": rows})
    broken = [f"{name(row)}: {fault}" for row in rows for fault in faults(row)]
    print("\n".join([*broken, f"{len(rows)} CUDA kernels, {len(broken)} faults"]))
    return 1 if broken else 0


def compile_rows(targets: Iterable[str], jobs: Iterable[plan.Job] | None = None) -> list[Row]:
    """Rows of all kernels, compiled side by side."""
    calls = [(job, target) for job in (jobs or plan.jobs()) for target in targets]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(lambda call: list(rows_of(*call)), calls)
        return [row for rows in found for row in rows]


def rows_of(job: plan.Job, target: str) -> Iterator[Row]:
    """Rows of the kernels in one source, for one class of head dims."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        said = plan.compile_to(job, cubin, "-cubin", f"-arch={target}", "-Xptxas=-v")
        binary = cubin.read_bytes()
    functions = {}
    if target in counts.RATES:
        code = inspect(binary, "--print-code", "nvdisasm")
        functions = {function.name: function for function in sass.parse(code)}
    for symbol, entry in sorted(entries(said).items()):
        kernel, arguments = named(symbol)
        row = {"kernel": kernel, "arguments": arguments, "target": target}
        row |= {"head_dim": job.head_dim, **entry}
        if symbol in functions:
            row |= _counted(functions[symbol])
        yield row


def entries(said: str) -> dict[str, dict[str, int]]:
    """What ptxas says of each kernel, by its symbol."""
    found = {}
    for text in said.split("Compiling entry function")[1:]:
        match = _ENTRY.search(f"Compiling entry function{text}")
        if match is None:
            raise ValueError(f"ptxas must say registers and spills, got {text[:200]!r}")
        shared = _SHARED.search(text)
        found[match[1]] = {
            "registers": int(match[6]),
            "spills": int(match[4]),
            "stack": int(match[3]),
            "static_shared": int(shared[1]) if shared else 0,
        }
    return found


def named(symbol: str) -> tuple[str, list[str]]:
    """A kernel's name and its template arguments in the project's words."""
    words = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\w+)(?:<(.*?)>)?\(", words.replace("(anonymous namespace)::", ""))
    if found is None:
        raise ValueError(f"a kernel must have a name, got {symbol!r}")
    return found[1], [_word(x.strip()) for x in (found[2] or "").split(",") if x.strip()]


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
    allowed = next(SPILLS[d] for d in SPILLS if (row["head_dim"] or 0) <= d)
    if "bwd" in row["kernel"]:
        allowed = kernel_table.SPILLS
    return [f"{row['spills']} bytes spilled"] if row["spills"] > allowed else []


if __name__ == "__main__":
    sys.exit(_command.run("cuda.table", main))
