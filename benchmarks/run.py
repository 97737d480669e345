"""The benchmark suite: `python -m dense_attn bench`, or `pytest benchmarks/` for pytest-benchmark's
own tables.

    python -m dense_attn bench                          all rows: a quarter of an hour on two cores
    python -m dense_attn bench --quick                  the rows of a minute
    python -m dense_attn bench --workload sd15-self-64  one workload; may be repeated
    python -m dense_attn bench --family sega            one family; may be repeated
    python -m dense_attn bench --contender sdpa         one contender; may be repeated
    python -m dense_attn bench --seconds 60             begin no row after a minute
    python -m dense_attn bench --shape 2,8,4096,77,40   a shape B,H,M,N,D[,dtype]; may be repeated
    ... --modulation mask --regions 8                   its modulation, its layout of 8 stripes
    python -m dense_attn bench --json FILE --plot FILE  write the results, draw them as .png or .svg
    python -m dense_attn bench --device cuda            a GPU's rows; --quick: those of 3 minutes
    python -m dense_attn bench --dry-run                a GPU's rows, smallest sizes, without a GPU
    pytest benchmarks/ --quick --benchmark-json=FILE    the same rows, by pytest-benchmark

Each row is a test, which pytest-benchmark times; this module runs pytest and reports. Before every
round of a contender its partner, this library, runs once (what the library is compared with runs
before the library's own rounds), so `ratio`, the time of the contender over the time of the
library, compares calls that stand beside each other in time.

Before it is timed a contender must pass its check. Attention, semantic guidance and chains: the
library's rule of accuracy (`dense_attn/verify/`) against the reference in float64, on all results
or, where these are too many, on a part; a baseline, whose rounding is not the library's to promise,
may err four times as much. Percentiles and steps on the integer grid: no bit may differ.
Gradients: 1e-4 of the largest element, against autograd in float64. What is too large is left out,
and says so.

Inputs are random; regions come from a real label map. Times are wall-clock seconds of one call,
memory is the growth of the process beyond inputs and results; on a GPU both are the GPU's own
(`clocks.py`, `machine.py`). Host costs are seconds of one thread (`host_cost/`). A figure is drawn
for each group of families that has rows: `--plot FILE.png` writes FILE.png (attention),
FILE-sega.png and FILE-reversible.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from dense_attn import _command, _environment, _files
from dense_attn.layout_attention.op import MODULATIONS

from . import plots
from .families import CONTENDERS, FAMILIES, GPU_FAMILIES, GPU_WORKLOADS, WORKLOADS
from .harness import machine
from .harness.bars import BARS, GPU_BARS
from .harness.header import describe_run, state_of_gpu
from .harness.table import format_row, heading
from .layout_attention import shapes

_FOLDER = Path(__file__).resolve().parent
_TESTS = (
    "harness/test_limits.py",
    "layout_attention/test_attention.py",
    "sega/test_sega.py",
    "reversible/test_reversible.py",
    "host_cost/test_host_cost.py",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite; 0 if every row that ran was right, 1 if not, 2 if pytest could not run it."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parse(argv)
    if arguments.dry_run and not _environment.flag("TRITON_INTERPRET"):
        again = [sys.executable, "-m", f"{__package__}.run", *argv]
        environment = os.environ | {"TRITON_INTERPRET": "1"}  # read when Triton is loaded
        return subprocess.run(again, env=environment, check=False).returncode
    machine.use(arguments.device, arguments.dry_run)
    report = Report(describe_run(arguments.quick), arguments.json, arguments.seconds)
    if arguments.regions:
        report.header["regions"] = f"{arguments.regions} stripes"
    tests = [str(_FOLDER / name) for name in _TESTS]
    # Nothing of the folder the user stands in takes part, and nothing is left in it.
    alone = [f"-c{os.devnull}", f"--rootdir={_FOLDER}", "-pno:terminal", "-pno:cacheprovider"]
    alone += [f"--benchmark-storage=file://{tempfile.gettempdir()}"]
    code = pytest.main([*tests, *alone, *_options(arguments)], plugins=[report])
    report.bar.close()
    if report.interrupted:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        print(f"dense_attn bench: pytest ended with {code!r}", file=sys.stderr)
        return 2

    if not report.rows and not report.not_reached:
        print("dense_attn bench: none of these workloads has rows here", file=sys.stderr)
        return 2

    if arguments.device == "cuda":
        report.header["state_at_end"] = state_of_gpu()
    results = report.results()
    _print_end(results)
    report.save()
    if arguments.plot:
        plots.draw(results, arguments.plot)
    return 1 if report.failed else 0


def _options(arguments: argparse.Namespace) -> list[str]:
    """The options as `conftest.py` takes them."""
    options = [f"--device={arguments.device}"]
    options += ["--quick"] * arguments.quick + ["--dry-run"] * arguments.dry_run
    for name in ("workload", "family", "contender", "shape"):
        options += [f"--{name}={value}" for value in getattr(arguments, name)]
    for name in ("modulation", "regions"):
        if value := getattr(arguments, name):
            options.append(f"--{name}={value}")
    return options


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m dense_attn bench", description="Run the benchmark suite."
    )
    add, several = parser.add_argument, {"action": "append", "default": []}
    add("--quick", action="store_true", help="the rows of a minute")
    add("--workload", **several, metavar="NAME", help="only this; may be repeated")
    add("--family", **several, metavar="NAME", help="only this; may be repeated")
    add("--contender", **several, metavar="NAME", help="only its rows; may be repeated")
    add("--seconds", type=_positive, metavar="N", help="begin no row after this time")
    add("--shape", **several, metavar="B,H,M,N,D[,dtype]", help="a shape of your own")
    add("--modulation", metavar="NAME", help=f"of the shapes: {', '.join(MODULATIONS)} (range)")
    stripes = "stripes of the shapes' layout (default: a real label map)"
    add("--regions", metavar="N", help=stripes)
    add("--device", choices=machine.SUITES, default="cpu", help="what is measured (%(default)s)")
    add("--dry-run", action="store_true", help="a GPU's rows on the smallest sizes, without a GPU")
    add("--json", type=Path, metavar="FILE", help="write the results")
    add("--plot", type=Path, metavar="FILE", help="draw them, .png or .svg")
    arguments = parser.parse_args(argv)
    if arguments.dry_run:
        arguments.device = "cuda"
    if fault := _fault(arguments):
        parser.error(fault)
    written = [arguments.json] * (arguments.json is not None)
    for file in written + (plots.files(arguments.plot) if arguments.plot is not None else []):
        _files.check(file)
    return arguments


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return number


def _fault(arguments: argparse.Namespace) -> str | None:
    """The rule that the arguments break, or None."""
    gpu = arguments.device == "cuda"
    if gpu and not arguments.dry_run and not torch.cuda.is_available():
        return "--device must be cpu where torch sees no GPU, got 'cuda' (--dry-run needs none)"
    if arguments.dry_run and find_spec("triton") is None:
        needed = "Triton, whose interpreter runs the kernels"
        return f"--dry-run needs {needed}: pip install dense_attn[triton]"
    allowed = {
        "workload": GPU_WORKLOADS if gpu else WORKLOADS,
        "family": list(GPU_FAMILIES if gpu else FAMILIES),
        "contender": CONTENDERS,
    }
    for option, names in allowed.items():
        for name in getattr(arguments, option):
            if name not in names:
                return f"--{option} must be one of {', '.join(names)}, got {name!r}"
    try:
        shapes.parse(arguments.shape, arguments.modulation, arguments.regions)
    except ValueError as error:
        return str(error)
    if arguments.shape and arguments.family and "attention" not in arguments.family:
        got = ", ".join(arguments.family)
        return f"--family must name attention beside --shape, got {got}"
    for option, path in (("--json", arguments.json), ("--plot", arguments.plot)):
        if path is not None and not path.absolute().parent.is_dir():
            return f"{option} must be in a folder that exists, got {path}"
    if arguments.plot is None:
        return None
    if find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install dense_attn[bench]"
    if arguments.plot.suffix not in (".png", ".svg"):
        return f"--plot must end in .png or .svg, got {arguments.plot}"
    return None


class Report:
    """The pytest plugin that gathers, prints and writes the rows as they come, above a bar."""

    def __init__(
        self, header: dict[str, Any], path: Path | None = None, seconds: float | None = None
    ) -> None:
        self.header, self._path, self._start = header, path, time.perf_counter()
        self._seconds, self.not_reached = seconds, 0
        self.rows: list[dict[str, Any]] = []
        self.limits: dict[str, float] = {}
        self.failed = self.interrupted = False
        self.bar = tqdm(unit="row", dynamic_ncols=True, leave=False, disable=None)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.bar.reset(total=len(session.items))

    def pytest_runtest_protocol(self) -> bool | None:
        """No row begins when the time is over."""
        if self._seconds is None or time.perf_counter() - self._start < self._seconds:
            return None
        self.not_reached += 1
        return True

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.bar.set_postfix_str(nodeid.partition("[")[2].rstrip("]"))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._say(str(report.longrepr))

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo) -> None:
        self.interrupted = excinfo.type is KeyboardInterrupt  # errors of collection come here too

    def pytest_internalerror(self, excrepr: object) -> None:
        self._say(str(excrepr))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        if report.when == "call":
            self.bar.update()
            if "limit" in found:
                self.limits.update([found["limit"]])
            if "row" in found:
                self._add(finish(found["row"], self.limits))
        if report.failed:
            self.failed = True
            if "row" not in found:
                self._say(f"{report.nodeid.rpartition('::')[2]}: {report.longreprtext}")

    def _add(self, row: dict[str, Any]) -> None:
        if not self.rows or self.rows[-1]["family"] != row["family"]:
            self._say(heading(row))
        self.rows.append(row)
        with suppress(_files.FileError):  # the end says so; until then there may be room again
            if self._path is not None and _files.is_kept(self._path):
                self.save()
        self._say(format_row(row))

    def results(self) -> dict[str, Any]:
        """The results by now."""
        header = self.header | {"seconds": round(time.perf_counter() - self._start, 1)}
        header |= {"not_reached": self.not_reached} if self.not_reached else {}
        rows = [] if machine.current().dry_run else self.rows
        bars = [bar.verdict(rows) for bar in (GPU_BARS if machine.on_gpu() else BARS)]
        return {"header": header, "limits": self.limits, "bars": bars, "rows": self.rows}

    def save(self) -> None:
        """Write the results by now: a run that is ended keeps its rows."""
        if self._path is not None:
            _files.write(self._path, json.dumps(self.results(), indent=1) + "\n")

    def _say(self, line: str) -> None:
        self.bar.write(line, file=sys.stdout)
        sys.stdout.flush()


def finish(row: dict[str, Any], limits: dict[str, float]) -> dict[str, Any]:
    """The row with its share of the machine's best matrix product and copy, once they are known."""
    best = limits.get(f"matmul_{row['dtype']}_gflop_per_s")
    if best and "gflop_per_s" in row:
        row["of_matmul"] = row["gflop_per_s"] / best
    if row["family"] == "attention" and "gb_per_s" in row and "copy_gb_per_s" in limits:
        row["of_large_copy"] = row["gb_per_s"] / limits["copy_gb_per_s"]
    if machine.current().dry_run:
        row["dry_run"] = True  # so that no line of the results can be taken for a measurement
    return row


def _print_end(results: dict[str, Any]) -> None:
    print()
    for name, value in results["limits"].items():
        print(f"limit of this machine: {name} {value:.0f}")
    for bar in results["bars"]:
        if bar["measured"] is not None:
            name = f"{bar['workload']} {bar['pass']} {bar['dtype']}: {bar['what']}"
            measured = f"{bar['measured']:>12.4g}  (bar {bar['bound']:g})"
            print(f"{bar['verdict']:<5} {name:<78} {measured}")
    header = results["header"]
    if header.get("dry_run"):
        print("a dry run without a GPU: every time and ratio above means nothing")
    if header.get("not_reached"):
        print(f"{header['not_reached']} rows were not reached in the time given")
    print(f"{len(results['rows'])} rows in {header['seconds']:.0f} s; regions: {header['regions']}")


if __name__ == "__main__":
    sys.exit(_command.run("dense_attn bench", main))
