"""`make gpu`: on a machine with a GPU and no network, build the library, test it, and measure it,
in one go.

Runs from the checkout with the Python that has torch, on the standard library alone. Wheels in
`.whl/` are installed for the run first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

from gpu_steps import BUILD, ROOT, Step, heed_requests_to_end, print_table, run

LIBRARY, WHEELS = BUILD / "lib", BUILD / "site"
TOOLS = ("memcheck", "racecheck", "initcheck")
_SEGA = "sega or percentile or guidance or interpolation"
_STEPS = "step or grid or sampler or chain or latents"
TESTS = {  # of each family of the benchmark, what of the tests is its own
    "attention": f"not ({_SEGA} or {_STEPS})",
    **dict.fromkeys(("percentile", "sega"), _SEGA),
    **dict.fromkeys(("steps", "chain", "gradient", "round_trip"), _STEPS),
    **dict.fromkeys(("host_cost", "launch"), ""),
}
# Every row compiles kernels of its own: of the table of cases, those that users meet most.
_CASES = "head-dim-40 or head-dim-128 or ordered-in-runs or cross-attention or flipped"
QUICK_TESTS = f"(not test_backends or bfloat16 and ({_CASES}))"
QUICK_MINUTES = 9.5
DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


def main(argv: Sequence[str] | None = None) -> int:
    """0 if all that can run here passed, 1 if not, 2 without a GPU or for wrong arguments."""
    arguments, date = _parse(argv), datetime.now(timezone.utc).isoformat(timespec="seconds")
    device = "dry run" if arguments.dry_run else _device()
    if not device:
        print(
            "make gpu: torch sees no GPU here; ARGS=--dry-run runs every step without one",
            file=sys.stderr,
        )
        return 2
    output = arguments.output.resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"make gpu: --output must be a folder that can be written: {error}", file=sys.stderr)
        return 2
    steps = _steps(arguments, device, output)
    wanted = [step for step in steps if _wanted(step.name, arguments.only)]
    outcomes = run(wanted, output, 60 * arguments.minutes)
    print_table(outcomes)
    summary = {
        "device": device,
        "dry_run": arguments.dry_run,
        "quick": arguments.quick,
        "date": date,
        "steps": [asdict(outcome) for outcome in outcomes],
    }
    files = runpy.run_path(str(ROOT / "dense_attn" / "_files.py"))  # the package imports torch
    try:
        files["write"](output / "summary.json", json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def _steps(arguments: argparse.Namespace, device: str, output: Path) -> list[Step]:
    dry = arguments.dry_run
    environment = {"PYTHONPATH": f"{LIBRARY}{os.pathsep}{WHEELS}"}
    interpreted = environment | {"TRITON_INTERPRET": "1"} if dry else environment
    return [
        Step("environment", [sys.executable, "-c", _ENVIRONMENT], most=120),
        _wheels(),
        _build(),
        _tests(arguments, interpreted),
        *(_sanitize(tool, interpreted, dry) for tool in TOOLS),
        Step("verify", _built("dense_attn", "verify"), environment=environment, least=15),
        Step(
            "bench",
            _bench(arguments, re.sub(r"\W+", "-", device.lower()).strip("-"), output),
            environment=environment,
            least=200 if arguments.quick and not dry else 60,
        ),
    ]


def _wheels() -> Step:
    """The packages that lie in `.whl/`."""
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command = [*pip, "--upgrade", "--target", str(WHEELS), *wheels]
    return Step("wheels", command, "" if wheels else "no wheels in .whl/", most=300, fresh=WHEELS)


def _bench(arguments: argparse.Namespace, name: str, output: Path) -> list[str]:
    """The command of the benchmark, whose results are named after the device."""
    results = ["--json", str(output / f"{name}.json"), "--plot", str(output / f"{name}.png")]
    families = [word for family in arguments.family for word in ("--family", family)]
    short = ["--quick"] * (arguments.quick or arguments.dry_run)
    short += ["--dry-run"] * arguments.dry_run
    return _built("dense_attn", "bench", "--device", "cuda", *results, *families, *short)


def _built(module: str, *arguments: str) -> list[str]:
    """A module's command, which fails where it used another dense_attn than the one built."""
    return [sys.executable, "-c", _RUN, str(LIBRARY), module, *arguments]


def _build() -> Step:
    """The library, its compiled part too where a compiler is there: Triton's kernels need none."""
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    there = shutil.which(compiler.split()[0]) is not None
    how = ["build", "--build-base", str(BUILD)] if there else ["build_py"]
    return Step(
        "build",
        [sys.executable, "setup.py", "--quiet", *how, "--build-lib", str(LIBRARY)],
        most=900,
        least=20,
        environment={"PYTHONPATH": str(WHEELS)},
        folder=ROOT,
        fresh=LIBRARY,
        note="" if there else "without the CPU kernels: no C++ compiler",
    )


def _tests(arguments: argparse.Namespace, environment: dict[str, str]) -> Step:
    """The tests whose kernels run on the GPU; without one, a few of them, interpreted."""
    options = ["-q", "-p", "no:cacheprovider", "-rs", "--import-mode=importlib"]
    chosen = " or ".join(f"({TESTS[family]})" for family in arguments.family if TESTS[family])
    files, selection = ["test_backends", "test_gpu", "triton_backend"], "(triton or test_gpu)"
    selection += f" and ({chosen})" if chosen else ""
    if arguments.dry_run:
        files, selection = ["triton_backend"], "test_the_table or test_ddim_step"
    elif arguments.quick:
        selection += f" and {QUICK_TESTS}"
    else:
        files += ["triton_attention", "triton_sega", "triton_steps"]
    paths = [str(ROOT / "tests" / "backends" / f"{file}.py") for file in files]
    none = arguments.family and not chosen and not arguments.dry_run
    command = _built("pytest", *options, "--rootdir", str(ROOT), *paths, "-k", selection)
    missing = "tests of these families" if none else ""
    return Step("tests", command, missing, environment=environment, least=60)


def _sanitize(tool: str, environment: dict[str, str], dry: bool) -> Step:
    """Small launches of every kernel under one of the toolkit's checkers, or, dry, without it."""
    program = _built("dense_attn.benchmarks.host_cost.launches")
    if dry:
        missing, note = ("", "the launches without the tool") if tool == TOOLS[0] else ("a GPU", "")
        return Step(f"sanitize-{tool}", program, missing, environment=environment, note=note)
    checker = shutil.which("compute-sanitizer")
    command = [checker or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *program]
    uncached = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    missing = "" if checker else "compute-sanitizer"
    return Step(f"sanitize-{tool}", command, missing, least=20, most=300, environment=uncached)


_RUN = """
import os, runpy, sys
library, module = sys.argv[1:3]
sys.argv[:] = sys.argv[2:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
finally:
    used = getattr(sys.modules.get("dense_attn"), "__file__", None)
    print("dense_attn:", used)
    if used is None or not os.path.realpath(used).startswith(os.path.realpath(library) + os.sep):
        sys.exit(f"dense_attn must be the one in {library}, got {used}")
"""
_ENVIRONMENT = """
import platform, shutil, subprocess, sys
print("python", sys.version)
for name in ("torch", "triton", "numpy", "pytest"):
    try:
        print(name, __import__(name).__version__)
    except ImportError as error:
        print(name, "is missing:", error)
torch = sys.modules.get("torch")
if torch is not None:
    print("cuda", torch.version.cuda, "compiled for", torch.cuda.get_arch_list())
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        print("GPU", index, name, torch.cuda.get_device_capability(index))
for program, *options in (
    ["nvidia-smi"],
    ["nvcc", "--version"],
    ["c++", "--version"],
    ["compute-sanitizer", "--version"],
):
    if shutil.which(program):
        print(subprocess.run([program, *options], capture_output=True, text=True).stdout)
    else:
        print(program, "is missing")
"""


def _device() -> str:
    """The GPU's name, "" where torch sees none or gives no answer."""
    try:
        return subprocess.run(
            [sys.executable, "-c", DEVICE], capture_output=True, text=True, timeout=120
        ).stdout.strip()
    except subprocess.TimeoutExpired:
        return ""


def _wanted(name: str, only: list[str]) -> bool:
    return not only or any(name == one or name.startswith(f"{one}-") for one in only)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "make gpu", description="Build, test and measure on a machine with a GPU."
    )
    names = ("environment", "wheels", "build", "tests", "sanitize", "verify", "bench")
    parser.add_argument(
        "--quick", action="store_true", help="a part of the tests and rows, within ten minutes"
    )
    parser.add_argument(
        "--minutes", type=_minutes, metavar="N", help=f"end by then ({QUICK_MINUTES} with --quick)"
    )
    parser.add_argument(
        "--only", action="append", default=[], choices=names, metavar="STEP", help=", ".join(names)
    )
    parser.add_argument(
        "--family",
        action="append",
        default=[],
        choices=tuple(TESTS),
        metavar="NAME",
        help=f"of the benchmark and its tests: {', '.join(TESTS)}",
    )
    parser.add_argument(
        "--output", type=Path, default=BUILD / "results", metavar="DIR", help="logs and results"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="every step without a GPU, through the interpreter"
    )
    arguments = parser.parse_args(argv)
    if arguments.output.exists() and not arguments.output.is_dir():
        parser.error(f"--output must be a folder, got {arguments.output}")
    if arguments.minutes is None:
        arguments.minutes = QUICK_MINUTES if arguments.quick else 0
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
