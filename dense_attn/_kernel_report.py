"""`info --kernels`: the kernels as compiled ahead of time, and the GPUs they ran on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from dense_attn._command import UserError
from dense_attn._kernel_hashes import kernel_hashes

_CALL = ("kernel", "target", "triton", "head_dim", "dtype", "modulation", "layout")
COLUMNS = (*_CALL, "tile", "warps", "stages", "registers", "spills", "shared", "matrix")
_COUNTED = ("instructions", "issue", "binding", "copies", "programs", "registers", "waves")
MODEL_COLUMNS = (*_CALL, "tile", *_COUNTED)
BAR_COLUMNS = ("target", "triton", "head_dim", "what", "value", "bound", "verdict", "issued")
CUDA_COLUMNS = ("kernel", "arguments", "head_dim", "target", "registers", "spills", "rounds")
_CUDA = """\
CUDA C++ kernels by nvcc {nvcc}, compiled, not run on a GPU; of a round of the longest loop, the
instructions that a warp executes, at least to at most, by its products on tensor cores"""
_BARS = "bars of the model, not measured: ours / plain by the busiest pipe; issued: of instructions"
_MODEL = """\
a model, not measured: ours / plain flash attention under the same tile, loop by loop: instructions
of a warp's round; for 128 x 64 scores the cycles that they take to issue, and the pipe that they
keep longest; copies in flight at each wait; programs an SM; waves of workloads on one {devices}"""


def report() -> list[str]:
    """The lines to print."""
    found = results()
    if "kernels.json" not in found:
        raise UserError("the table of kernels is not installed: make kernels writes it")
    table = found["kernels.json"]
    header = table["header"]
    revision = (header["git_revision"] or "an unknown revision")[:12]
    rows = [[_cell(row, name) for name in COLUMNS] for row in table["rows"]]
    lines = [f"compiled ahead of time, not run, at {revision}", *grid([COLUMNS, *rows]), ""]
    counted = [_counted(row) for row in table["rows"] if "plain" in row]
    devices = ", ".join(f"{device} ({target})" for target, device in header["devices"].items())
    model = _MODEL.format(devices=devices)
    lines += [*model.splitlines(), *grid([MODEL_COLUMNS, *counted]), ""]
    judged = [[_cell(bar, name) for name in BAR_COLUMNS] for bar in table["bars"]]
    lines += [_BARS, *grid([BAR_COLUMNS, *judged]), ""]
    lines += _cuda(table)
    headers = {name: result["header"] for name, result in found.items()}
    return lines + sources(header["kernels"], headers)


def _cuda(table: dict[str, Any]) -> list[str]:
    """The table of the CUDA library's kernels, where it has been made."""
    rows = [
        row
        | {"arguments": " ".join(row["arguments"]) or "-", "head_dim": row["head_dim"] or "-"}
        | {
            "rounds": ", ".join("{}: {} to {}".format(*ways) for ways in row.get("rounds", []))
            or "-"
        }
        for row in table.get("cuda_rows", [])
    ]
    cells = [[_cell(row, name) for name in CUDA_COLUMNS] for row in rows]
    said = _CUDA.format(**table["cuda"]).splitlines() if rows else []
    return [*said, *grid([CUDA_COLUMNS, *cells]), ""] if rows else []


def stale(headers: dict[str, dict[str, Any]]) -> list[str]:
    """Results from GPUs whose kernels are no longer the sources'."""
    now, lines = kernel_hashes(), []
    for name, header in headers.items():
        if _ran_on_gpu(header):
            ran = header["kernels"]
            changed = [file for file, value in now.items() if ran.get(file) != value]
            if changed:
                lines.append(
                    f"{name}: {header['device']} ran other sources of {', '.join(changed)}"
                )
    return lines


def sources(table: dict[str, str], headers: dict[str, dict[str, Any]]) -> list[str]:
    """A line for each kernel file: whether the table is its own, and the GPUs that ran it."""
    lines = [["source", "table", "ran on"]]
    for file, value in kernel_hashes().items():
        ran = {
            header["device"]: header["kernels"].get(file) == value
            for header in headers.values()
            if _ran_on_gpu(header) and file in header["kernels"]
        }
        gpus = [device if same else f"{device} (other sources)" for device, same in ran.items()]
        of_these = "of these sources" if table.get(file) == value else "table is of other sources"
        lines.append([file, of_these, ", ".join(gpus) or "not run on a GPU"])
    return grid(lines)


def results() -> dict[str, dict[str, Any]]:
    """All results that are installed, by their file's name."""
    folder = files("dense_attn.benchmarks") / "results"
    if not folder.is_dir():
        return {}
    return {
        path.name: json.loads(path.read_text(encoding="utf-8"))
        for path in folder.iterdir()
        if path.name.endswith(".json")
    }


def _ran_on_gpu(header: dict[str, Any]) -> bool:
    """Whether a result is of kernels that ran; compiled ones name no device, a dry run no GPU."""
    return "kernels" in header and "device" in header and not header.get("dry_run", False)


def _counted(row: dict[str, Any]) -> list[str]:
    """The line of a row that has plain attention beside it."""
    sides = [_side(row), _side(row["plain"])]
    both = [" / ".join(cells) if cells[0] or cells[1] else "-" for cells in zip(*sides)]
    waves = ", ".join(f"{name} {number}" for name, number in row.get("waves", {}).items())
    return [*(_cell(row, name) for name in (*_CALL, "tile")), *both, waves or "-"]


def _side(facts: dict[str, Any]) -> list[str]:
    """The cells of ours or of plain attention."""
    bodies = facts["bodies"]
    cells = [[body["instructions"] for body in bodies]]
    cells.append([body["cycles"]["issue"] for body in bodies])
    cells.append([max(body["cycles"], key=body["cycles"].get) for body in bodies])
    cells.append([wait for body in bodies for wait in body.get("copy_waits", ())])
    cells += [[facts["programs"]], [facts["registers"]]]
    return [" ".join(map(str, cell)) for cell in cells]


def _cell(row: dict[str, Any], name: str) -> str:
    if name == "matrix":
        return " ".join(f"{count} {kind}" for kind, count in row[name].items()) or "-"
    return str(row.get(name, "-"))


def grid(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of cells under each other."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    ]
