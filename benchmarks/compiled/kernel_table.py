"""The table of Triton kernels: `python -m dense_attn.benchmarks.compiled.kernel_table --json FILE`,
or `make kernels`.

Every kernel under every launch configuration, compiled ahead of time; no GPU is needed and nothing
is run. A row says which call launched the kernel, what the compiler made of it and how many
programs a device holds; for sm_80 and sm_90 also what its loops are made of, beside plain
attention's: `loops` is their number, `bodies` their counts, or those of a kernel without any.

    --json FILE      write the table
    --calls NAME     everything; configurations, each once; tested, those of the test suite; few
    --target NAME    only the calls for this device; may be repeated
    --triton FOLDER  each configuration also with the Triton in this folder; may be repeated
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton

from dense_attn import __version__, _command, _files
from dense_attn._kernel_hashes import kernel_hashes
from dense_attn.triton_kernels import configs

from ..harness.revision import git_revision
from . import bars, kernel_calls, model
from .ahead_of_time import SHARED_LIMITS, Launch, compiled
from .kernel_calls import Attention, Other
from .occupancy import DEVICES

MODULE = "dense_attn.benchmarks.compiled.kernel_table"
Row = dict[str, Any]
MATRIX = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
TILED_FORWARD = [f"layout_attention_{kind}fwd_kernel" for kind in ("", "specialised_")]
SPILLS = 56  # bytes that a backward kernel may spill; above 16 `configs` gives the reason
AHEAD = 2  # groups of copies, keys' and values', that a loop over tiles leaves in flight
MOST_LOCAL = 32  # of so many instructions of a round one may be for what has spilled
SLOWEST = ("gfx942", "sm_100")  # to compile for, which therefore comes first
NUMBERS = ("registers", "spills", "shared")
MEASURED = (*NUMBERS, "matrix", "fused", "divisions")
MODELLED = ("programs", "loops", "bodies", "plain", "waves")  # what `model` adds


def main(argv: Sequence[str] | None = None) -> int:
    """Compile, print what breaks a rule and what misses a bar, write; 1 if a rule is broken."""
    arguments = _parse(argv)
    _files.check(arguments.json)
    calls = kernel_calls.CALLS[arguments.calls]()
    targets = arguments.target or MATRIX
    rows, failed = compile_rows(call for call in calls if call.target in targets)
    for folder in arguments.triton:
        beside = compile_elsewhere(folder, targets, "configurations")
        rows, failed = rows + beside["rows"], failed + beside["failed"]
    versions = {"dense_attn": __version__, "torch": torch.__version__}
    header = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions | {"triton": triton.__version__},
        "git_revision": git_revision(),
        "kernels": kernel_hashes(),
        "devices": {target: device.name for target, device in DEVICES.items()},  # of waves
    }
    before = read(arguments.json) if arguments.json.exists() else {}
    kept = {name: before[name] for name in ("cuda", "cuda_rows") if name in before}
    found = {"header": header, "bars": bars.bars(rows), "failed": failed, "rows": rows}
    write(arguments.json, found | kept)
    broken = failed + [f"{name(row)}: {fault}" for row in rows for fault in faults(row)]
    print("\n".join([*broken, bars.said(found["bars"])]))
    print(f"{len(rows)} kernels, {len(broken)} faults")
    return 1 if broken else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(f"python -m {MODULE}", description="Compile all kernels.")
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="write the table")
    which = {"choices": kernel_calls.CALLS, "default": "everything"}
    parser.add_argument("--calls", **which, help="all, or those of the tests")
    several = {"action": "append", "default": []}
    parser.add_argument("--target", **several, choices=MATRIX, help="only for this device")
    beside = "each configuration also with this Triton; may be repeated"
    parser.add_argument("--triton", **several, type=Path, metavar="FOLDER", help=beside)
    arguments = parser.parse_args(argv)
    for folder in arguments.triton:
        if not (folder / "triton").is_dir():
            parser.error(f"--triton must be a folder with Triton in it, got {folder}")
    return arguments


def compile_rows(calls: Iterable[Attention | Other]) -> tuple[list[Row], list[str]]:
    """Rows of all calls, compiled side by side, nothing taken from a cache; and the calls that the
    compiler fails at, each with its reason.
    """
    ordered = sorted(calls, key=lambda call: call.target not in SLOWEST)
    with tempfile.TemporaryDirectory() as cache:
        pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), _use_cache, (cache,))
        with pool:
            found = list(pool.map(_rows_or_failure, ordered))
    rows = [row for rows in found if not isinstance(rows, str) for row in rows]
    return rows, [failure for failure in found if isinstance(failure, str)]


def _rows_or_failure(call: Attention | Other) -> list[Row] | str:
    """Rows of a call, or a sentence: a compiler raises what it likes, and no call costs others."""
    try:
        return compile_call(call)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        return f"{call} does not compile by Triton {triton.__version__}: {reason}"


def _use_cache(folder: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.set_num_threads(1)


def compile_call(call: Attention | Other, modelled: bool = True) -> list[Row]:
    """Rows of the kernels that one call launches."""
    with compiled(call.target) as launches:
        call()
    rows = [row_of(call, launch) for launch in launches]
    if modelled:
        rows = [row | model.of_launch(call, launch) for row, launch in zip(rows, launches)]
    # Variants are kernels that differ in what Triton knows of their arguments alone.
    for index, row in enumerate(rows):
        row["variant"] = sum(key(row) == key(before | {"variant": 0}) for before in rows[:index])
    return rows


def compile_elsewhere(
    folder: Path | None = None, targets: Iterable[str] = MATRIX, calls: str = "tested"
) -> dict[str, Any]:
    """The table of some calls, made by a process of its own with the Triton in a folder."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if folder is not None:
        paths = (str(folder.resolve()), environment.get("PYTHONPATH"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "kernels.json")
        command = [sys.executable, "-m", MODULE, "--calls", calls, "--json", str(file)]
        command += [word for target in targets for word in ("--target", target)]
        options = {"capture_output": True, "text": True, "errors": "replace", "check": False}
        done = subprocess.run(command, env=environment, **options)
        if not file.exists():
            raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
        return read(file)


def read(file: Path) -> dict[str, Any]:
    """A table: its header and rows."""
    return json.loads(file.read_text(encoding="utf-8"))


def write(file: Path, table: dict[str, Any]) -> None:
    """A table as JSON, each row of a list in a line."""
    parts = []
    for name, value in table.items():
        text = json.dumps(value)
        if isinstance(value, list) and value:
            text = "[\n  {}\n ]".format(",\n  ".join(map(json.dumps, value)))
        parts.append(f' "{name}": {text}')
    _files.write(file, "{\n" + ",\n".join(parts) + "\n}\n")


def row_of(call: Attention | Other, launch: Launch) -> Row:
    """A line of the table."""
    constants = launch.constants
    names = ("BLOCK_M", "BLOCK_N", "BLOCK", "TILE", "PROGRAMS")
    sides = [constants[side] for side in names if side in constants]
    others = {name: str(value) for name, value in constants.items()}
    return {
        "kernel": launch.kernel,
        "triton": triton.__version__,
        **call.facts,
        "constants": {} if "HEAD_DIM" in constants else others,
        "variant": 0,
        "tile": "x".join(map(str, sides[:2])),
        "warps": launch.warps,
        "stages": launch.stages,
        **{name: getattr(launch, name) for name in MEASURED},
    }


def key(row: Row) -> str:
    """A row's difference from the others: all that was not found in it."""
    found = (*MEASURED, *MODELLED)
    facts = {name: value for name, value in row.items() if name not in found}
    return json.dumps(facts, sort_keys=True)


def name(row: Row) -> str:
    """A row in a few words."""
    fields = ("head_dim", "dtype", "modulation", "layout")
    call = [str(row[field]) for field in fields if field in row]
    return " ".join([row["kernel"], row["target"], f"Triton {row['triton']}", *call, row["tile"]])


def faults(row: Row) -> list[str]:
    """The rules that a row breaks."""
    found = []
    if row["shared"] > SHARED_LIMITS[row["target"]]:
        found.append(f"{row['shared']} bytes of shared memory, of {SHARED_LIMITS[row['target']]}")
    if row["spills"] > (SPILLS if "bwd" in row["kernel"] else _accepted(row)):
        found.append(f"{row['spills']} bytes spilled")
    attention = row["kernel"].startswith("layout_attention")
    return found + (_attention_faults if attention else _exactness_faults)(row)


def _accepted(row: Row) -> int:
    """Bytes that the configuration of a tiled forward kernel may spill with its tile or half of it,
    by its table.
    """
    if row["kernel"] not in TILED_FORWARD:
        return 0
    precision = kernel_calls.precision_of(row["dtype"], row["tf32"])
    kind = row["target"], precision, row["head_dim"], row["seqlen"]
    config = configs.layout_attention_fwd(*kind)
    whole = row["tile"].startswith(f"{config.BLOCK_M}x")
    return config.spills if whole else config.half_spills


def _attention_faults(row: Row) -> list[str]:
    """Half floats in aligned rows go through the matrix units, loops over tiles wait for no copy of
    the next two, and those over whole tiles hardly for what has spilled.
    """
    found = []
    narrow, unit = row["dtype"] != "float32", MATRIX[row["target"]]
    if narrow and row["head_dim"] % 8 == 0 and unit not in row["matrix"]:
        found.append(f"no {unit}")
    bodies = row["bodies"] if row.get("loops") else []
    copying = bodies[:1] if "bwd" in row["kernel"] else bodies
    ahead = row["stages"] > AHEAD and row["kernel"] != TILED_FORWARD[1]  # which has no such copies
    if ahead and any(min(body.get("copy_waits", [0])) < AHEAD for body in copying):
        found.append("waits for copies of the next tiles")
    for body in bodies[:1] if "bwd" in row["kernel"] else bodies[::2]:
        local, of = body["kinds"].get("local", 0), body["instructions"]
        if local * MOST_LOCAL > of:
            found.append(f"{local} of {of} instructions of a round for what has spilled")
    return found


def _exactness_faults(row: Row) -> list[str]:
    """Thresholds and steps are the same bits everywhere: no fused product, no inexact quotient."""
    found = []
    if "div.full" in row["divisions"]:
        found.append("a quotient that is not rounded to nearest")
    # gfx942 makes exact quotients, and integers of ranks, by fused steps.
    ranks = row["kernel"] == "thresholds_kernel"
    exact = ranks or "v_div_fmas" in row["divisions"]
    if row["fused"] and not (exact and row["target"] == "gfx942"):
        found.append(f"{row['fused']} fused multiply-adds")
    return found


def differences(committed: Iterable[Row], now: Iterable[Row]) -> list[str]:
    """The numbers in which the committed table is not what is compiled now, by the same Triton."""
    known = {key(row): row for row in committed}
    found = []
    for row in now:
        before = known.get(key(row))
        if before is None:
            found.append(f"{name(row)}: not in the table")
            continue
        for what in NUMBERS:
            if before[what] != row[what]:
                found.append(f"{name(row)}: {what} {before[what]}, now {row[what]}")
        found += [
            f"{name(row)}: {what} is another now"
            for what in MODELLED
            if what in row and row[what] != before.get(what)
        ]
    return found


if __name__ == "__main__":
    sys.exit(_command.run("kernel_table", main))
