"""The limits of the kernels, by Nsight Compute: `python -m dense_attn.benchmarks.gpu.profile`.

A line for each kernel: issue, pipes, stalls, registers and time. Exit code 77 where the profiler
is not there or may not read the counters.
"""

from __future__ import annotations

import argparse
import csv
import io
import shutil
import subprocess
import sys

from ..harness import machine
from . import program, sweep
from .real_sizes import Case

MODULE = "dense_attn.benchmarks.gpu.profile"
KERNELS = ("fwd-d64", "bwd_kv-d64", "row-d40", "fwd-d40")  # in the order in which they are launched
TIMES = 2  # that each is launched, of which the last is shown
_NAMES = "regex:layout_attention_(fwd|bwd_kv|row_fwd)_kernel"
_SECTIONS = (
    *("ComputeWorkloadAnalysis", "SchedulerStats", "WarpStateStats", "SpeedOfLight"),
    *("LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "InstructionStats"),
)
_SHOWN = (  # parts of the names of counters
    *("gpu__time_duration", "issue_active", "inst_executed_pipe", "issue_stalled", "pipe_tensor"),
    *("registers_per_thread", "occupancy_limit", "warps_active", "dram__throughput", "l1tex__data"),
    *("smsp__inst_executed.sum", "smsp__cycles_active.avg"),
)


def launch(dry: bool) -> None:
    """Launch each of KERNELS as often as TIMES says, and no other launch of theirs."""
    size = {"side": 12, "heads": 1} if dry else {}
    dtype = "float16" if dry else "bfloat16"
    narrow, wide = Case(40, dtype, True, **size), Case(64, dtype, True, **size)
    sweep.call_of(wide, "fwd", None)()  # its preparation is a first launch, here and below
    backward = sweep.call_of(wide, "bwd_q", None)
    for _ in range(TIMES):
        backward()
    for _ in range(TIMES):
        sweep.prepare(Case(40, dtype, kind="cross", **size))
    sweep.call_of(narrow, "fwd", None)()
    machine.current().synchronize()


def main(run: program.Run) -> int:
    """Run this program again under the profiler; 0 if it had numbers, else 77."""
    if run.options.launch:
        launch(run.dry)
        return 0
    command = [sys.executable, "-m", MODULE, "--launch"]
    profiler = shutil.which("ncu")
    if run.dry:
        command.append("--dry-run")
    elif profiler is None:
        print("ncu is missing")
        return program.SKIPPED
    else:
        sections = [word for section in _SECTIONS for word in ("--section", section)]
        how = ["--clock-control", "none", "--csv", "--page", "raw", "--target-processes", "all"]
        command = [profiler, "--kernel-name", _NAMES, *how, *sections, *command]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if run.dry:
        program.say(launched=done.returncode == 0)
        sys.stdout.write(done.stderr)
        return done.returncode
    found = parse(done.stdout)
    for name, counters in found:
        program.say(kernel=name, **counters)
    if not found:
        print(done.stdout[-4000:], done.stderr[-4000:], sep="\n")
        said = [line for line in (done.stdout + done.stderr).splitlines() if "==ERROR==" in line]
        print("ncu read no counters", *said[:1])
    return 0 if found else program.SKIPPED


def parse(text: str) -> list[tuple[str, dict[str, str]]]:
    """Each kernel's name and counters, of the table that the profiler prints among other lines."""
    lines = text.splitlines()
    heads = [place for place, line in enumerate(lines) if line.startswith('"ID"')]
    found = list(csv.DictReader(io.StringIO("\n".join(lines[heads[0] :])))) if heads else []
    if not found:
        return []
    units, rows = found[0], [row for row in found[1:] if row.get("Kernel Name")]
    names = [row["Kernel Name"] for row in rows]
    if len(rows) == TIMES * len(KERNELS):
        rows, names = rows[TIMES - 1 :: TIMES], KERNELS
    return [(name, _shown(row, units)) for name, row in zip(names, rows)]


def _shown(row: dict[str, str], units: dict[str, str]) -> dict[str, str]:
    chosen = [name for name in row if name and any(part in name for part in _SHOWN)]
    return {name: f"{row[name]} {units.get(name) or ''}".strip() for name in chosen}


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--launch", action="store_true", help="launch the kernels alone")


if __name__ == "__main__":
    sys.exit(program.start(MODULE, main, _add))
