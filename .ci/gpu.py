"""`make gpu`, or `python3 .ci/gpu.py`: on a machine with a GPU and no network, build the library,
compile its kernels, see that they are right, and measure them, in nine minutes.

Runs from the checkout with the Python that has torch, on the standard library alone. Wheels in
`.whl/` are installed for the run first. `--output` gets one JSON and one archive, whatever happens.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import gpu_plan
from gpu_report import Report, print_table
from gpu_steps import BUILD, Runner, heed_requests_to_end

DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
_DRY_MINUTES = 60  # two cores interpret slowly
_RESERVED = 10  # seconds at the end, in which what does not heed a request is ended


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that can run here passed, 1 if not, 2 without a GPU or for wrong arguments."""
    start, arguments = time.monotonic(), _parse(argv)
    device = "dry run" if arguments.dry_run else _device()
    if not device:
        print(
            "make gpu: torch sees no GPU here; ARGS=--dry-run runs every step without one",
            file=sys.stderr,
        )
        return 2
    output, work = arguments.output.resolve(), BUILD / "run"
    header = {
        "device": device,
        "dry_run": arguments.dry_run,
        "minutes": arguments.minutes,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"make gpu: --output must be a folder that can be written: {error}", file=sys.stderr)
        return 2
    report, steps = Report(output, work, header), gpu_plan.steps(arguments, work)
    seconds = max(1, 60 * arguments.minutes - _RESERVED - (time.monotonic() - start))
    try:
        outcomes = Runner(steps, work, seconds, report.write).run()
    except OSError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    print_table(outcomes)
    print(f"{report.json} and {report.archive.name} hold it all")
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _device() -> str:
    """The GPU's name, "" where torch sees none or gives no answer."""
    try:
        return subprocess.run(
            [sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=120
        ).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "make gpu", description="Build, test and measure on a machine with a GPU."
    )
    add, several = parser.add_argument, {"action": "append", "default": []}
    long = f"share this time among the steps ({gpu_plan.MINUTES}); from {gpu_plan.LONG_MINUTES} on"
    add("--minutes", type=_minutes, metavar="N", help=f"{long} with all tests and rows")
    names = ", ".join(gpu_plan.PLAN)
    add("--only", **several, choices=tuple(gpu_plan.PLAN), metavar="STEP", help=names)
    families, contenders = tuple(gpu_plan.TESTS), (*gpu_plan.OWN, *gpu_plan.REST)
    help_of = {"metavar": "NAME", "help": f"of the benchmark and its tests: {', '.join(families)}"}
    add("--family", **several, choices=families, **help_of)
    help_of["help"] = f"of the benchmark alone: {', '.join(contenders)}"
    add("--contender", **several, choices=contenders, **help_of)
    where = "gets one JSON and one archive"
    add("--output", type=Path, default=BUILD / "results", metavar="DIR", help=where)
    add("--dry-run", action="store_true", help="every step small, without a GPU")
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output must be a folder, got {arguments.output}")
    if arguments.minutes is None:
        arguments.minutes = _DRY_MINUTES if arguments.dry_run else gpu_plan.MINUTES
    return arguments


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0
    if not 0 < minutes < 10**6:
        raise argparse.ArgumentTypeError(f"must be a positive number of minutes, got {text!r}")
    return minutes


if __name__ == "__main__":
    heed_requests_to_end()
    sys.exit(main())
