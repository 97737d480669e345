"""The steps of `make gpu`, in the order of evidence, and the seconds that each is planned to take.

Kernels are compiled first, side by side, then seen to be right, then measured; what needs long
compilations and tells of others comes last, for a run's time may end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

from gpu_build import LIBRARY, WHEELS
from gpu_steps import BUILD, ROOT, Step

PLAN = {  # seconds of 9 minutes, of which a longer run has more in the same proportions
    "wheels": 6,
    "environment": 12,
    "build": 3,
    "cuda-kernels": 60,  # the others get what it leaves
    "cpu-kernels": 120,  # beside the next ones, until something is timed
    "prewarm": 60,
    "real-sizes": 45,
    "own": 66,
    "sweep": 40,
    "profile": 35,
    "memcheck": 100,  # beside the tests
    "racecheck": 100,
    "tests": 75,
    "verify": 45,
    "families": 40,
    "rest": 42,
}
MINUTES = 9
LONG_MINUTES = 20  # from which on the tests' whole table and all rows are asked for
GPU = "dense_attn.benchmarks.gpu"
OWN = (  # the contenders of the first benchmark: the library's ways, plain attention
    *("dense_attn", "dense_attn-triton", "dense_attn-cuda"),
    *("dense_attn-sorted", "dense_attn-no-lists", "dense_attn-gather"),
    *("sdpa", "sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flash-attn"),
)
REST = (  # and of the last
    *("eager", "sdpa-bias", "efficient-bias", "xformers"),
    *("flash-channels", "flex-naive", "flex-smart"),
)
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
_CASES += " or range and (groups-of-some-keys or keys-100-columns-40)"
SHORT_TESTS = f"(not test_backends or bfloat16 and ({_CASES}))"
MOST_TESTERS = 8  # processes
_FOUND = 9  # the exit code of a checker that found something


def steps(arguments: argparse.Namespace, folder: Path) -> list[Step]:
    """The steps wanted, in their order; benchmarks write into a folder."""
    dry = arguments.dry_run
    found = (str(LIBRARY), str(WHEELS), os.environ.get("PYTHONPATH"))
    here = {
        "PYTHONPATH": os.pathsep.join(filter(None, found)),
        "TRITON_CACHE_DIR": str(BUILD / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(BUILD / "inductor"),
    }
    here |= {"TRITON_INTERPRET": "1"} if dry else {}
    wheels = {"PYTHONPATH": str(WHEELS)}
    every = [
        _wheels(),
        _step("environment", [sys.executable, "-c", _ENVIRONMENT], environment=here),
        _step("build", _build("python"), fresh=LIBRARY),
        _step(
            "cuda-kernels",
            _build("cuda", *["--dry-run"] * dry),
            environment=wheels,
            note="nothing compiled" if dry else "",
        ),
        _step("cpu-kernels", _build("cpu"), environment=wheels, background=True),
        _program("prewarm", here, dry, partial=True),
        _program("real-sizes", here, dry),
        _bench("own", arguments, here, folder),
        _program("sweep", here, dry, quiet=True, partial=True),
        _program("profile", here, dry, quiet=True, note="the launches alone" if dry else ""),
        *(_sanitize(tool, here, dry) for tool in ("memcheck", "racecheck")),
        _tests(arguments, here),
        _step("verify", built("dense_attn", "verify"), environment=here),
        _bench("families", arguments, here, folder),
        _bench("rest", arguments, here, folder),
    ]
    return [step for step in every if not arguments.only or step.name in arguments.only]


def _step(name: str, command: list[str], **options: object) -> Step:
    return Step(name, command, planned=PLAN[name], **options)


def built(module: str, *arguments: str) -> list[str]:
    """A module's command, which fails where it used another dense_attn than the one built."""
    return [sys.executable, "-c", _RUN, str(LIBRARY), module, *arguments]


def _build(part: str, *options: str) -> list[str]:
    return [sys.executable, str(ROOT / ".ci" / "gpu_build.py"), part, *options]


def _program(name: str, environment: dict[str, str], dry: bool, **options: object) -> Step:
    """A program of `benchmarks/gpu`."""
    command = built(f"{GPU}.{name.replace('-', '_')}", *["--dry-run"] * dry)
    return _step(name, command, environment=environment, timed=True, **options)


def _wheels() -> Step:
    """The packages that lie in `.whl/`."""
    wheels = sorted(map(str, (ROOT / ".whl").glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    command = [*pip, "--no-compile", "--upgrade", "--target", str(WHEELS), *wheels]
    return _step("wheels", command, missing="" if wheels else "no wheels in .whl/", fresh=WHEELS)


def _bench(
    name: str, arguments: argparse.Namespace, environment: dict[str, str], folder: Path
) -> Step:
    """A part of the benchmark: own rows of attention, the other families, or the other rows."""
    families = arguments.family or list(TESTS)
    chosen = ["attention"] if "attention" in families else []
    contenders = list({"own": OWN, "rest": REST}.get(name, ()))
    if name == "families":
        chosen = [family for family in families if family != "attention"]
        contenders = arguments.contender
    elif arguments.contender:
        contenders = [x for x in contenders if x in arguments.contender]
        chosen = chosen if contenders else []
    words = [word for family in chosen for word in ("--family", family)]
    words += [word for who in contenders for word in ("--contender", who)]
    words += ["--json", str(folder / f"{name}.json")]
    plots = ["--plot", str(folder / f"{name}.png")] if has("matplotlib") else []
    short = arguments.minutes < LONG_MINUTES or arguments.dry_run
    words += ["--dry-run"] if arguments.dry_run else ["--device", "cuda"]
    command = built("dense_attn", "bench", *words, *plots, *["--quick"] * short)
    missing = "" if chosen else "rows of these families and contenders"
    missing = missing or _needs("pytest", "pytest_benchmark", "tqdm")
    how = {"quiet": True, "timed": True, "partial": True, "rows": folder / f"{name}.json"}
    return _step(name, command, missing=missing, environment=environment, **how)


def _tests(arguments: argparse.Namespace, environment: dict[str, str]) -> Step:
    """The tests whose kernels run on the GPU; without one, a few of them, interpreted."""
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-rs"]
    options.append("--import-mode=importlib")
    chosen = " or ".join(f"({TESTS[family]})" for family in arguments.family if TESTS[family])
    files, selection = ["test_backends", "test_gpu", "triton_backend"], "(triton or cuda or gpu)"
    selection += f" and ({chosen})" if chosen else ""
    if arguments.dry_run:
        files, selection = ["triton_backend"], "test_the_table or test_ddim_step"
    elif arguments.minutes < LONG_MINUTES:
        selection += f" and {SHORT_TESTS}"
    else:
        files += ["triton_attention", "triton_lists", "gpu_sega", "gpu_steps"]
    paths = [str(ROOT / "tests" / "backends" / f"{file}.py") for file in files]
    testers, note = min(MOST_TESTERS, os.cpu_count() or 1), ""
    if not arguments.dry_run:
        absent = _needs("xdist", "execnet")
        note = f"in one process: {absent} is missing" if absent else f"in {testers} processes"
        options += [] if absent else ["-n", str(testers)]
    command = built("pytest", *options, "--rootdir", str(ROOT), *paths, "-k", selection)
    none = arguments.family and not chosen and not arguments.dry_run
    missing = "tests of these families" if none else _needs("pytest")
    return _step("tests", command, missing=missing, environment=environment, note=note)


def _sanitize(tool: str, environment: dict[str, str], dry: bool) -> Step:
    """Small launches of every kernel under one of the toolkit's checkers, or, dry, without it."""
    program = built("dense_attn.benchmarks.host_cost.launches")
    how = {"environment": environment, "background": True}
    if dry:
        missing = "" if tool == "memcheck" else "a GPU"
        return _step(tool, program, missing=missing, note="the launches without the tool", **how)
    checker = shutil.which("compute-sanitizer")
    command = [
        checker or "compute-sanitizer",
        "--tool",
        tool,
        "--error-exitcode",
        f"{_FOUND}",
        *program,
    ]
    how["environment"] = environment | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    if tool == "racecheck":
        how |= {"lead": _FOUND, "note": "hazards of asynchronous copies and wgmma may be none"}
    return _step(tool, command, missing="" if checker else "compute-sanitizer", **how)


def has(module: str) -> bool:
    """Whether a package is installed, or lies in `.whl/`, whose names have more words."""
    if find_spec(module) is not None:
        return True
    return any(module in path.name.lower() for path in (ROOT / ".whl").glob("*.whl"))


def _needs(*modules: str) -> str:
    """The first module that is missing, "" where none is."""
    return next((module for module in modules if not has(module)), "")


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
import os, platform, shutil, subprocess, sys
from importlib import metadata
print("python", sys.version)
print("cores", len(os.sched_getaffinity(0)), platform.platform())
packages = "torch triton numpy pytest pytest-xdist pytest-benchmark matplotlib setuptools"
for name in packages.split():
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is missing")
import torch
print("cuda", torch.version.cuda, "compiled for", torch.cuda.get_arch_list())
for index in range(torch.cuda.device_count()):
    print("GPU", index, torch.cuda.get_device_properties(index))
for program, *options in (
    ["nvidia-smi"],
    ["nvcc", "--version"],
    ["c++", "--version"],
    ["compute-sanitizer", "--version"],
    ["ncu", "--version"],
):
    if shutil.which(program):
        done = subprocess.run([program, *options], capture_output=True, text=True, timeout=30)
        print(done.stdout, done.stderr)
    else:
        print(program, "is missing")
"""
