"""`make compat`: the wheel of `make wheel` on each Python and torch, its core tests from the source
distribution and `verify`, and the table of them. Where nvcc is, a CUDA library of one class of head
dims is put into each installation and loaded; the same kernels are called as PTX, emulated.

Environments stay in .venv/compat; a version that cannot be installed, a test or a row that fails,
fails the run. `--only PYTHON` makes the row of one Python, and a page of it alone.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from datetime import datetime, timezone
from pathlib import Path

import wheels

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "compat"
SUPPORT = ROOT / "tests" / "support"
ONE_CLASS = {
    "DENSE_ATTN_CUDA": "1",
    "DENSE_ATTN_CUDA_ARCHS": "80",
    "DENSE_ATTN_CUDA_HEAD_DIMS": "40",
}
TABLE = ROOT / "docs" / "compatibility.md"
PAIRS = (("3.10", "2.11.0"), ("3.11", "2.13.0"), ("3.13", "newest"))  # a Python and its torch
TOOLS = ("numpy", "pytest", "hypothesis", "expecttest")
ENDS = ("*.tar.gz", f"*{platform.machine()}.whl")  # of what is in dist/
CORE = (
    ("backends/test_backends.py", "-m", "core"),
    (
        "backends/test_backend_table.py",
        "layout_attention/test_framework.py",
        "sega/test_quantile.py",
        "sega/test_framework.py",
        "reversible/test_kernels.py",
        "reversible/test_raw_calls.py",
        "reversible/test_framework.py",
        "reversible/test_ddim_step.py",
    ),
)
SEEN = """
import json, torch, dense_attn
from importlib.metadata import PackageNotFoundError, version
try: triton = version("triton")
except PackageNotFoundError: triton = "none"
states = {name: "; ".join(sorted(set(ops.values()))) for name, ops in dense_attn.backends().items()}
print(dense_attn.__file__, torch.__version__, triton, sep="\\n")
print(*(states[name] for name in ("cpu", "triton", "cuda")), sep="\\n")
"""
# The library with the stand-in for CUDA's runtime: a call that is refused, one that is emulated.
CALLS = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from cuda import build
build.library = lambda: Path(sys.argv[1])
from cuda.compiled import compiled_backend
from cuda.launch import emulated
runtime = compiled_backend()
import torch
from dense_attn import reference
q = torch.randn(1, 2, 20, 40, dtype=torch.float16, device="cpu")
words = torch.tensor([1, 2], dtype=torch.int32, device="cpu").repeat(10)
how = words, words, None, "range", 0.2, None, None, None, None, None, 0.7, False, False
fwd = torch.ops.dense_attn_cuda.layout_attention_fwd
try:
    fwd(*[q.float()] * 3, *how)
    raise SystemExit("nothing was refused")
except RuntimeError as error:
    assert "q must be float16 or bfloat16, got Float" in str(error), error
with emulated(runtime) as runs:
    out = fwd(q, q, q, *how)[0]
exact = reference.layout_attention(*[q.double()] * 3, words, words, 0.7, scale=0.2)[0]
assert runs and (out - exact).abs().max() < 1e-2
print("emulated calls are right")
"""
TEXT = """# Compatibility

One wheel, `{wheel}`, as `make wheel` built it on Python {python} with torch
{built} against the stable ABI of torch 2.11, in an environment of its own on each Python and torch:
the core tests (every backend of layout attention, semantic guidance and reversible steps), from the
source distribution, and `python -m dense_attn verify`; and the CUDA library, of one class of head
dims: put beside the wheel's and loaded, and its kernels called with an emulator in the GPU's place.
`make compat` writes this page; {date}, no GPU.

| Python | torch | Triton | core tests | verify | CPU kernels | Triton kernels | CUDA kernels |
|---|---|---|---|---|---|---|---|
{rows}
"""


class Failure(RuntimeError):
    """A fault of the run, in a few words."""


@dataclass
class Row:
    """A line of the table."""

    python: str
    torch: str
    triton: str = "-"
    tests: str = "-"
    verify: str = "-"
    cpu: str = "-"
    triton_kernels: str = "-"
    cuda: str = "-"

    @property
    def failed(self) -> bool:
        """Whether anything of the line is wrong."""
        return "FAILED" in self.tests + self.verify + self.cuda or self.cpu != "available"


@dataclass
class Built:
    """The files that every environment gets, and the source distribution's tests."""

    wheel: Path
    tests: Path
    cuda: Path | None
    emulated: Path | None


def main(argv: Sequence[str] | None = None) -> int:
    """Build, run, write the table; 1 if anything failed."""
    parser = argparse.ArgumentParser(prog="make compat", description=__doc__)
    only = "this Python's row; may be repeated"
    parser.add_argument("--only", action="append", metavar="PYTHON", help=only)
    only = parser.parse_args(argv).only or [python for python, _ in PAIRS]
    WORK.mkdir(parents=True, exist_ok=True)
    built = build()
    rows = []
    for python, torch in PAIRS:
        if python in only:
            print(f"Python {python}, torch {torch}", flush=True)
            rows.append(row_of(python, torch, built))
            print(f"  {'FAILED' if rows[-1].failed else 'passed'}: {rows[-1]}", flush=True)
    write(built.wheel, rows)
    return int(any(row.failed for row in rows))


def build() -> Built:
    """The wheel and the tests beside it; where nvcc is, the CUDA libraries too."""
    if wheels.main([]):
        raise SystemExit("make compat: there is no wheel")
    sdist, wheel = (max(wheels.DIST.glob(end), key=os.path.getmtime) for end in ENDS)
    folder = WORK / "sdist"
    shutil.rmtree(folder, ignore_errors=True)
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    (tests,) = folder.iterdir()
    return Built(wheel, tests, cuda_library(), emulated_library())


def cuda_library() -> Path | None:
    """The CUDA library as an installation has it; None where nvcc is not."""
    if not shutil.which("nvcc"):
        return None
    folders = ("--build-temp", str(WORK / "temp"), "--build-lib", str(WORK))
    run(Path(sys.executable), "setup.py", "--quiet", "build_ext", *folders, cwd=ROOT)
    return WORK / "dense_attn" / "_CUDA.so"


def emulated_library() -> Path | None:
    """The CUDA library for the emulator, built with the development environment's torch too; None
    where nvcc is not.
    """
    if not shutil.which("nvcc"):
        return None
    script = f"import sys; sys.path.insert(0, {str(SUPPORT)!r}); from cuda import build"
    return Path(run(Path(sys.executable), "-c", f"{script}; print(build.library())").stdout.strip())


def row_of(version: str, torch: str, built: Built) -> Row:
    """The line of one Python and torch, on which the wheel is installed."""
    row = Row(version, torch)
    try:
        python = install(version, torch, built)
        seen = run(python, "-c", SEEN).stdout.splitlines()
        place, row.torch, row.triton, row.cpu, row.triton_kernels, row.cuda = seen
        if not Path(place).is_relative_to(python.parents[1]):
            raise Failure(f"dense_attn is not the wheel's: {place}")
        if built.emulated is not None:
            row.cuda = cuda_kernels(python, row.cuda, built.emulated)
        row.verify = verify(python)
        row.tests = core_tests(python, built.tests)
    except Failure as failure:
        print(failure, flush=True)
        row.verify = row.tests = "FAILED"
    return row


def install(version: str, torch: str, built: Built) -> Path:
    """The Python of the environment that has this torch, the tools of the tests and the wheel."""
    folder = ROOT / ".venv" / "compat" / f"python{version}-torch{torch}"
    python = folder / "bin" / "python"
    if not python.exists():
        run(interpreter(version), "-m", "venv", str(folder))
    which = ("--upgrade", "torch") if torch == "newest" else (f"torch=={torch}",)
    pip(python, "install", *which, *TOOLS)
    pip(python, "install", "--no-deps", "--force-reinstall", str(built.wheel))
    if built.cuda is not None:
        (package,) = folder.glob("lib/python*/site-packages/dense_attn")
        shutil.copy(built.cuda, package)
    return python


def interpreter(version: str) -> Path:
    """The interpreter of a version, which a version manager may have to be asked for."""
    found = shutil.which(f"python{version}")
    if found is None or run(Path(found), "--version", check=False).returncode:
        raise Failure(f"Python {version} must be on this machine")
    return Path(found)


def cuda_kernels(python: Path, state: str, emulated: Path) -> str:
    """The state of the wheel's library, which must load, and what became of the emulated calls."""
    done = run(python, "-c", CALLS, str(emulated), str(SUPPORT), check=False)
    if state.startswith("the CUDA library") or done.returncode:
        print(state, done.stderr[-2000:], sep="\n", flush=True)
        return "FAILED"
    return f"{state}; {done.stdout.strip()}"


def verify(python: Path) -> str:
    """The last line of `verify`, with the rows that failed."""
    done = run(python, "-m", "dense_attn", "verify", check=False)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if "FAILED" in line]
    if failed or done.returncode or not lines:
        print("\n".join(failed or [done.stderr[-2000:]]), flush=True)
        return "FAILED"
    return lines[-1]


def core_tests(python: Path, tests: Path) -> str:
    """How many tests passed and were skipped."""
    passed = skipped = broken = 0
    for number, selection in enumerate(CORE):
        report = WORK / f"{python.parents[1].name}-{number}.xml"
        report.unlink(missing_ok=True)
        files = [str(tests / "tests" / x) if x.endswith(".py") else x for x in selection]
        options = ["-q", "-p", "no:cacheprovider", "-c", str(tests / "pyproject.toml")]
        options += ["--rootdir", str(tests), "--junitxml", str(report)]
        done = run(python.with_name("pytest"), *options, *files, check=False)
        found = counted(report)
        if done.returncode or sum(found) == 0:
            print(done.stdout[-3000:], done.stderr[-2000:], flush=True)
            found = (*found[:2], max(found[2], 1))
        passed, skipped, broken = passed + found[0], skipped + found[1], broken + found[2]
    return f"{passed} passed, {skipped} skipped" + (f", {broken} FAILED" if broken else "")


def counted(report: Path) -> tuple[int, int, int]:
    """How many tests of a report passed, were skipped and failed; none without a report."""
    if not report.exists():
        return 0, 0, 0
    suite = ElementTree.parse(report).getroot().find("testsuite")
    names = ("tests", "skipped", "failures", "errors")
    total, skipped, *broken = (int(suite.get(name)) for name in names)
    return total - skipped - sum(broken), skipped, sum(broken)


def pip(python: Path, *arguments: str) -> None:
    """Run pip quietly."""
    run(python, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir", "-qq", *arguments)


def run(
    program: Path, *arguments: str, check: bool = True, cwd: Path = WORK
) -> subprocess.CompletedProcess:
    """Run a program away from the sources, so that it finds the wheel's package alone. What it
    compiles for CUDA is one class; what asks pyenv gets the version of its name.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= ONE_CLASS if shutil.which("nvcc") else {}
    if program.name.startswith("python3."):
        environment["PYENV_VERSION"] = program.name.removeprefix("python")
    how = {"cwd": cwd, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([str(program), *arguments], **how, check=False)
    if check and done.returncode:
        raise Failure(f"{' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done


def write(wheel: Path, rows: list[Row]) -> None:
    """The page."""
    import torch

    words = {
        "wheel": wheel.name,
        "built": torch.__version__,
        "date": f"{datetime.now(timezone.utc):%-d %B %Y}",
        "python": ".".join(map(str, sys.version_info[:2])),
        "rows": "\n".join(f"| {' | '.join(astuple(row))} |" for row in rows),
    }
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(TEXT.format(**words))


if __name__ == "__main__":
    sys.exit(main())
