"""`make gpu`: on a machine with a GPU and no network, build the library, test it, and measure it,
in one go.

Runs from the checkout with the Python that has torch, on the standard library alone. Every step is
a process of its own with a log; one that fails is reported, and the others still run. Wheels in
`.whl/` are installed for the run first.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
LIBRARY, WHEELS = BUILD / "lib", BUILD / "site"
TOOLS = ("memcheck", "racecheck", "initcheck")
_SEGA, _STEPS = (
    "sega or percentile or guidance or interpolation",
    "step or grid or sampler or chain or latents",
)
TESTS = {  # of each family of the benchmark, what of the tests is its own
    "attention": f"not ({_SEGA} or {_STEPS})",
    **dict.fromkeys(("percentile", "sega"), _SEGA),
    **dict.fromkeys(("steps", "chain", "gradient", "round_trip"), _STEPS),
    "launch": "",
}
# Every row compiles kernels of its own: of the table of cases, those that users meet most.
_CASES = "head-dim-40 or head-dim-128 or ordered-in-runs or cross-attention or flipped"
QUICK_TESTS = f"(not test_backends or bfloat16 and ({_CASES}))"
QUICK_MINUTES = 9.5
GRACE = 5  # seconds from the request to end to the end
DEVICE = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"


@dataclass(frozen=True)
class Step:
    """A command, why it cannot run here, and the least and the most seconds that it is given."""

    name: str
    command: list[str]
    missing: str = ""
    least: float = 5
    most: float = 3600
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = BUILD  # where nothing of the checkout can be imported by chance
    fresh: Path | None = None  # emptied first
    note: str = ""  # what a reader of "passed" must know


@dataclass
class Outcome:
    """What became of a step."""

    step: str
    verdict: str  # "passed", "not here: ...", or what is wrong
    seconds: float
    log: str

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return not self.verdict.startswith(("passed", "not here"))


def main(argv: Sequence[str] | None = None) -> int:
    """0 if every step that can run here passed, 1 if not, 2 if the arguments cannot be used or
    there is no GPU.
    """
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
    steps = [
        step for step in _steps(arguments, device, output) if _wanted(step.name, arguments.only)
    ]
    outcomes = run(steps, output, 60 * arguments.minutes)
    _print_table(outcomes)
    steps = [asdict(outcome) for outcome in outcomes]
    summary = {
        "device": device,
        "dry_run": arguments.dry_run,
        "quick": arguments.quick,
        "date": date,
        "steps": steps,
    }
    write = runpy.run_path(str(ROOT / "dense_attn" / "_files.py"))[
        "write"
    ]  # without torch, which the package imports
    try:
        write(output / "summary.json", json.dumps(summary, indent=1) + "\n")
    except OSError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        return 2
    return 1 if any(outcome.failed for outcome in outcomes) else 0


def run(steps: list[Step], output: Path, seconds: float = 0) -> list[Outcome]:
    """Each step in turn, whatever became of those before; of `seconds`, if not 0, later ones keep
    their least.
    """
    end = time.monotonic() + seconds if seconds else None
    outcomes = []
    for index, step in enumerate(steps):
        left = step.most
        if end is not None:
            kept = [later.least for later in steps[index + 1 :] if not later.missing]
            left = min(
                left, end - time.monotonic() - sum(kept) - GRACE * bool(kept)
            )  # a step may be slow to end
        try:
            outcomes.append(_outcome(step, output, left))
        except KeyboardInterrupt:
            outcomes += [Outcome(ended.name, "interrupted", 0, "") for ended in steps[index:]]
            break
        print(f"{step.name}: {outcomes[-1].verdict} ({outcomes[-1].seconds:.0f} s)", flush=True)
    return outcomes


def _outcome(step: Step, output: Path, seconds: float) -> Outcome:
    log, start = output / f"{step.name}.log", time.monotonic()
    if step.missing:
        return Outcome(step.name, f"not here: {step.missing}", 0, "")
    if seconds < step.least:
        return Outcome(step.name, "no time left", 0, "")
    if step.fresh is not None:
        shutil.rmtree(step.fresh, ignore_errors=True)
    step.folder.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(shlex.join(step.command) + "\n")
        file.flush()
        code = _call(step, file, seconds)
    passed = f"passed, {step.note}" if step.note else "passed"
    verdict = (
        passed
        if code == 0
        else f"ran past {seconds:.0f} s"
        if code is None
        else f"exit code {code}"
    )
    if code != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("".join(f"  {line}\n" for line in lines[-15:]), end="")
    return Outcome(step.name, verdict, round(time.monotonic() - start, 1), log.name)


def _call(step: Step, file: object, seconds: float) -> int | None:
    """The exit code, None past the time; what the step has started ends with it, also when this
    process is asked to.
    """
    environment = (
        os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"} | step.environment
    )
    process = subprocess.Popen(
        step.command,
        cwd=step.folder,
        env=environment,
        stdout=file,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        for ending in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, ending)
                process.wait(GRACE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue


def _steps(arguments: argparse.Namespace, device: str, output: Path) -> list[Step]:
    dry, quick = arguments.dry_run, ["--quick"] * arguments.quick
    environment = {"PYTHONPATH": f"{LIBRARY}{os.pathsep}{WHEELS}"}
    interpreted = environment | {"TRITON_INTERPRET": "1"} if dry else environment
    name = re.sub(r"\W+", "-", device.lower()).strip("-")
    results = ["--json", str(output / f"{name}.json"), "--plot", str(output / f"{name}.png")]
    families = [word for family in arguments.family for word in ("--family", family)]
    bench = [
        "bench",
        "--device",
        "cuda",
        *results,
        *families,
        *(["--dry-run", "--quick"] if dry else quick),
    ]
    wheels = sorted(str(wheel) for wheel in (ROOT / ".whl").glob("*.whl"))
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--upgrade",
        "--target",
    ]
    return [
        Step("environment", [sys.executable, "-c", _ENVIRONMENT], most=120),
        Step(
            "wheels",
            [*pip, str(WHEELS), *wheels],
            "" if wheels else "no wheels in .whl/",
            most=300,
            fresh=WHEELS,
        ),
        _build(),
        _tests(arguments, interpreted),
        *(_sanitize(tool, interpreted, dry) for tool in TOOLS),
        Step("verify", _built("dense_attn", "verify"), environment=environment, least=15),
        Step(
            "bench",
            _built("dense_attn", *bench),
            environment=environment,
            least=200 if quick and not dry else 60,
        ),
    ]


def _built(module: str, *arguments: str) -> list[str]:
    """The command of a module, which fails if the dense_attn that it used is not the one that was
    built.
    """
    return [sys.executable, "-c", _RUN, str(LIBRARY), module, *arguments]


def _build() -> Step:
    """The library with its compiled part, where a compiler is there: the Triton kernels need
    none.
    """
    compiler = os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++"
    there = shutil.which(compiler.split()[0]) is not None
    how = ["build", "--build-base", str(BUILD)] if there else ["build_py"]
    command = [sys.executable, "setup.py", "--quiet", *how, "--build-lib", str(LIBRARY)]
    path = {"PYTHONPATH": str(WHEELS)}
    note = "" if there else "without the CPU kernels: no C++ compiler"
    return Step(
        "build",
        command,
        most=900,
        least=20,
        environment=path,
        folder=ROOT,
        fresh=LIBRARY,
        note=note,
    )


def _tests(arguments: argparse.Namespace, environment: dict[str, str]) -> Step:
    """The tests whose kernels run on the GPU; without one, a few of them through the
    interpreter.
    """
    options = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-rs",
        "--import-mode=importlib",
        "--rootdir",
        str(ROOT),
    ]
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
    missing = (
        "tests of these families"
        if arguments.family and not chosen and not arguments.dry_run
        else ""
    )
    command = _built("pytest", *options, *paths, "-k", selection)
    return Step("tests", command, missing, environment=environment, least=60)


def _sanitize(tool: str, environment: dict[str, str], dry: bool) -> Step:
    """Small launches of every kernel under a checker of the toolkit's; in a dry run, the launches
    alone.
    """
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
        print("GPU", index, torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index))
for command in (["nvidia-smi"], ["nvcc", "--version"], ["c++", "--version"], ["compute-sanitizer", "--version"]):
    if shutil.which(command[0]):
        print(subprocess.run(command, capture_output=True, text=True).stdout)
    else:
        print(command[0], "is missing")
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
    parser.add_argument("--family", action="append", default=[], choices=tuple(TESTS), metavar="NAME",
                        help=f"of the benchmark and its tests: {', '.join(TESTS)}")  # fmt: skip
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


def _print_table(outcomes: list[Outcome]) -> None:
    print(f"\n{'step':<20} {'seconds':>8}  {'verdict':<40} log")
    for outcome in outcomes:
        print(f"{outcome.step:<20} {outcome.seconds:8.1f}  {outcome.verdict:<40} {outcome.log}")


def heed_requests_to_end() -> None:
    """The first one ends the running step; a second does not disturb that."""

    def interrupted(*_: object) -> None:
        for request in (signal.SIGTERM, signal.SIGINT):
            signal.signal(request, signal.SIG_IGN)
        raise KeyboardInterrupt

    for request in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request, interrupted)


if __name__ == "__main__":
    heed_requests_to_end()
    sys.exit(main())
