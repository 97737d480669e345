"""`make compat`: one wheel beside each torch, its core tests and `verify`, and the table of them.

Environments stay in .venv/compat; a version that cannot be installed, a test or a row that fails,
fails the run.
"""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build" / "compat"
TABLE = ROOT / "docs" / "compatibility.md"
VERSIONS = ("2.11.0", "2.13.0", "newest")
TOOLS = ("numpy", "pytest", "hypothesis", "expecttest")
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
found = dense_attn.__file__, torch.__version__, triton, states["cpu"], states["triton"]
print(*found, sep="\\n")
"""
TEXT = """# Compatibility

One wheel, `{wheel}`, built with torch {built} against the stable ABI of torch 2.11, in an
environment of its own beside each torch: the core tests (every backend of layout attention,
semantic guidance and reversible steps) and `python -m dense_attn verify`. `make compat` writes this
page; {date}, Python {python}, no GPU.

| torch | Triton | core tests | verify | CPU kernels | Triton kernels |
|---|---|---|---|---|---|
{rows}
"""


class Failure(RuntimeError):
    """A fault of the run, in a few words."""


@dataclass
class Row:
    """A line of the table."""

    torch: str
    triton: str = "-"
    tests: str = "-"
    verify: str = "-"
    cpu: str = "-"
    gpu: str = "-"

    @property
    def failed(self) -> bool:
        """Whether anything of the line is wrong."""
        return "FAILED" in self.tests + self.verify or self.cpu != "available"


def main() -> int:
    """Build, run, write the table; 1 if anything failed."""
    WORK.mkdir(parents=True, exist_ok=True)
    wheel = build()
    rows = []
    for version in VERSIONS:
        print(f"torch {version}", flush=True)
        rows.append(row_of(version, wheel))
        print(f"  {'FAILED' if rows[-1].failed else 'passed'}: {rows[-1]}", flush=True)
    write(wheel, rows)
    return int(any(row.failed for row in rows))


def build() -> Path:
    """The wheel, built with the development environment's torch."""
    for old in WORK.glob("*.whl"):
        old.unlink()
    how = ("--no-deps", "--no-build-isolation", "--wheel-dir", str(WORK))
    pip(Path(sys.executable), "wheel", *how, str(ROOT))
    (wheel,) = WORK.glob("*.whl")
    return wheel


def row_of(version: str, wheel: Path) -> Row:
    """The line of one torch, beside which the wheel is installed."""
    row = Row(version)
    try:
        python = install(version, wheel)
        place, row.torch, row.triton, row.cpu, row.gpu = run(python, "-c", SEEN).stdout.splitlines()
        if not Path(place).is_relative_to(python.parents[1]):
            raise Failure(f"dense_attn is not the wheel's: {place}")
        row.verify = verify(python)
        row.tests = core_tests(python)
    except Failure as failure:
        print(failure, flush=True)
        row.verify = row.tests = "FAILED"
    return row


def install(version: str, wheel: Path) -> Path:
    """The Python of the environment that has this torch, the tools of the tests and the wheel."""
    folder = ROOT / ".venv" / "compat" / f"torch-{version}"
    python = folder / "bin" / "python"
    if not python.exists():
        run(Path(sys.executable), "-m", "venv", str(folder))
    torch = ("--upgrade", "torch") if version == "newest" else (f"torch=={version}",)
    pip(python, "install", *torch, *TOOLS)
    pip(python, "install", "--no-deps", "--force-reinstall", str(wheel))
    return python


def verify(python: Path) -> str:
    """The last line of `verify`, with the rows that failed."""
    done = run(python, "-m", "dense_attn", "verify", check=False)
    lines = done.stdout.splitlines()
    failed = [line for line in lines if "FAILED" in line]
    if failed or done.returncode or not lines:
        print("\n".join(failed or [done.stderr[-2000:]]), flush=True)
        return "FAILED"
    return lines[-1]


def core_tests(python: Path) -> str:
    """How many tests passed and were skipped."""
    passed = skipped = broken = 0
    for number, selection in enumerate(CORE):
        report = WORK / f"{python.parents[1].name}-{number}.xml"
        report.unlink(missing_ok=True)
        files = [str(ROOT / "tests" / word) if word.endswith(".py") else word for word in selection]
        options = ["-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
        options += ["--rootdir", str(ROOT), "--junitxml", str(report)]
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


def run(program: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run a program away from the sources, so that it finds the wheel's package alone."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    how = {"cwd": WORK, "env": environment, "capture_output": True, "text": True}
    done = subprocess.run([str(program), *arguments], **how, check=False)
    if check and done.returncode:
        raise Failure(f"{' '.join(arguments)}: {done.stderr.strip()[-2000:]}")
    return done


def write(wheel: Path, rows: list[Row]) -> None:
    """The page."""
    import torch

    cells = [(row.torch, row.triton, row.tests, row.verify, row.cpu, row.gpu) for row in rows]
    words = {
        "wheel": wheel.name,
        "built": torch.__version__,
        "date": f"{datetime.now(timezone.utc):%-d %B %Y}",
        "python": ".".join(map(str, sys.version_info[:2])),
        "rows": "\n".join(f"| {' | '.join(line)} |" for line in cells),
    }
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(TEXT.format(**words))


if __name__ == "__main__":
    sys.exit(main())
