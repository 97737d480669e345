"""The steps of `make gpu`, whatever they are: each a process of its own with a log and a time.

One that fails is reported, and the others still run. On the standard library alone.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
GRACE = 5  # seconds from the request to end to the end


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
    """The end of a step."""

    step: str
    verdict: str  # "passed", "not here: ...", or what is wrong
    seconds: float
    log: str

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return not self.verdict.startswith(("passed", "not here"))


def run(steps: list[Step], output: Path, seconds: float = 0) -> list[Outcome]:
    """The end of each step, in turn; of `seconds`, if not 0, later ones keep their least."""
    end = time.monotonic() + seconds if seconds else None
    outcomes = []
    for index, step in enumerate(steps):
        left = step.most
        if end is not None:
            kept = [later.least for later in steps[index + 1 :] if not later.missing]
            slow_end = GRACE * bool(kept)
            left = min(left, end - time.monotonic() - sum(kept) - slow_end)
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
    verdict = f"passed, {step.note}" if step.note else "passed"
    if code != 0:
        verdict = f"ran past {seconds:.0f} s" if code is None else f"exit code {code}"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("".join(f"  {line}\n" for line in lines[-15:]), end="")
    return Outcome(step.name, verdict, round(time.monotonic() - start, 1), log.name)


def _call(step: Step, file: TextIO, seconds: float) -> int | None:
    """The exit code, None past the time; what the step has started ends with it in any case."""
    environment = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"} | step.environment
    process = subprocess.Popen(
        step.command,
        cwd=step.folder,
        env=os.environ | environment,
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


def print_table(outcomes: list[Outcome]) -> None:
    """Each step's time, verdict and log."""
    print(f"\n{'step':<20} {'seconds':>8}  {'verdict':<40} log")
    for outcome in outcomes:
        print(f"{outcome.step:<20} {outcome.seconds:8.1f}  {outcome.verdict:<40} {outcome.log}")


def heed_requests_to_end() -> None:
    """Let a request to end this process end the running step, and a second one disturb nothing."""

    def interrupted(*_: object) -> None:
        for request in (signal.SIGTERM, signal.SIGINT):
            signal.signal(request, signal.SIG_IGN)
        raise KeyboardInterrupt

    for request in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request, interrupted)
