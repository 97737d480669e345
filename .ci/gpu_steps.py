"""The steps of `make gpu`, whatever they are: each a process of its own with a log and a limit.

One that fails or runs past its limit is reported, and the others still run. On the standard library
alone.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu"
GRACE = 4  # seconds from the request to end to the end
SKIPPED = 77  # the exit code of a step whose tool is not to be had; its last line says why
TO_END = 15  # seconds that a timed step's program has to start and to end its last row
LONGEST_LOG = 1 << 28  # bytes, at which a step ends
_SHOWN = 300  # characters of a row
_TICK, _TOLD = 0.2, 10  # seconds between two looks at what runs, and two reports


@dataclass(frozen=True)
class Step:
    """A command, why it cannot run here, and its planned share of the seconds."""

    name: str
    command: list[str]
    missing: str = ""
    planned: float = 10
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = BUILD  # where nothing of the checkout can be imported by chance
    fresh: Path | None = None  # emptied first
    note: str = ""  # what a reader of "passed" must know
    lead: int = 0  # an exit code that is a hint to follow, and no verdict
    background: bool = False  # runs beside the next steps, until one that is quiet
    quiet: bool = False  # times something, so that nothing may run beside it
    timed: bool = False  # takes --seconds, and ends by itself
    partial: bool = False  # the rows that came are a result
    rows: Path | None = None  # the file of a benchmark's


@dataclass
class Outcome:
    """The end of a step."""

    step: str
    verdict: str  # "passed", "not here: ...", "ended after ...", "a lead ...", or what is wrong
    seconds: float
    log: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return not self.verdict.startswith(("passed", "not here", "ended after", "a lead"))


class Running:
    """A step's process, the lines of whose log are read as they come."""

    def __init__(self, step: Step, log: Path, limit: float) -> None:
        self.step, self.log, self.limit, self.start = step, log, limit, time.monotonic()
        self.rows: list[dict[str, Any]] = []
        self._read, self._tail = 0, b""
        if step.fresh is not None:
            shutil.rmtree(step.fresh, ignore_errors=True)
        step.folder.mkdir(parents=True, exist_ok=True)
        command = list(step.command)
        if step.timed:
            command += ["--seconds", f"{max(1, limit - TO_END):.0f}"]
        environment = {"PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"} | step.environment
        log.write_text(shlex.join(command) + "\n", encoding="utf-8", errors="surrogateescape")
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command,
                cwd=step.folder,
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group to end; of this session, with which it ends
            )

    @property
    def over(self) -> str:
        """The reason why the step must end now, or ""."""
        if time.monotonic() - self.start > self.limit:
            return f"ran past {self.limit:.0f} s"
        return "its log is too long" if self.log.stat().st_size > LONGEST_LOG else ""

    def read(self) -> None:
        """Keep, and print, the rows that came since."""
        with self.log.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._tail = (self._tail + new).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")[:_SHOWN]
            if line.startswith(b"{"):
                with suppress(ValueError):
                    self.rows.append(json.loads(line))
                    print(f"{self.step.name} {text}", flush=True)
            elif self.step.rows is not None:
                print(text, flush=True)

    def end(self) -> None:
        """End the process and what it has started, whether it heeds a request or not."""
        for ending in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, ending)
                self.process.wait(GRACE)

    def outcome(self, over: str) -> Outcome:
        """The verdict on an ended step, the end of whose log is printed if it failed."""
        self.end()
        self.read()
        seconds, code = round(time.monotonic() - self.start, 1), self.process.poll()
        lines = self.log.read_text(encoding="utf-8", errors="replace")[-20_000:].splitlines()
        if over:
            wrong = self._wrong()
            verdict = f"{wrong or over}"
            if self.step.partial and not wrong:
                verdict = f"ended after {self.limit:.0f} s, its rows are kept"
        elif code == SKIPPED:
            verdict = f"not here: {lines[-1] if lines else ''}"
        elif code and code == self.step.lead:
            verdict = f"a lead: exit code {code}, {self.step.note}"
        else:
            note = f", {self.step.note}" if self.step.note else ""
            verdict = f"passed{note}" if code == 0 else f"exit code {code}"
        outcome = Outcome(self.step.name, verdict, seconds, self.log.name, self.rows)
        if outcome.failed:
            print("".join(f"  {line[:300]}\n" for line in lines[-15:]), end="")
        return outcome

    def _wrong(self) -> str:
        """The wrong rows of a step whose time ended, "" without any."""
        rows = list(self.rows)
        if self.step.rows is not None:
            with suppress(OSError, ValueError):
                rows += json.loads(self.step.rows.read_text(encoding="utf-8"))["rows"]
        wrong = [row for row in rows if row.get("wrong") is True or row.get("right") is False]
        return f"{len(wrong)} wrong rows, and its time ended" if wrong else ""


class Runner:
    """Steps in turn, each with its share of the seconds that are left."""

    def __init__(
        self, steps: list[Step], logs: Path, seconds: float, tell: Callable[[Runner], None]
    ) -> None:
        self.steps, self.logs, self.outcomes = steps, logs, []
        self.start = time.monotonic()
        self.end = self.start + seconds
        self.running: list[Running] = []
        self._tell, self._told = tell, time.monotonic()

    def run(self) -> list[Outcome]:
        """The end of each step, in the order in which they ended."""
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self._print_plan()
        try:
            for index, step in enumerate(self.steps):
                if step.quiet:
                    self._wait(None)
                self._one(index, step)
            self._wait(None)
        except KeyboardInterrupt:
            self._interrupt()
        finally:
            for running in self.running:
                running.end()
        self.running.clear()
        self._tell(self)
        return self.outcomes

    def _interrupt(self) -> None:
        """End what runs, and keep its rows."""
        for running in self.running:
            running.end()
            running.read()
        ended = {outcome.step for outcome in self.outcomes}
        rows = {running.step.name: running.rows for running in self.running}
        for step in self.steps:
            if step.name not in ended:
                lost = Outcome(step.name, "interrupted", 0, "", rows.get(step.name, []))
                self.outcomes.append(lost)

    def share(self, index: int) -> float:
        """The seconds of a step: of those left, in proportion to what is planned from it on; one
        in the background takes none from the others.
        """
        left, step = max(0.0, self.end - time.monotonic()), self.steps[index]
        rest = sum(x.planned for x in self.steps[index:] if not (x.missing or x.background))
        return min(left, left * step.planned / rest) if rest else left

    def _one(self, index: int, step: Step) -> None:
        """Start a step, and wait for it unless it runs in the background."""
        if step.missing:
            self._add(Outcome(step.name, f"not here: {step.missing}", 0, ""))
            return
        limit = self.share(index)
        if limit < 1:
            self._add(Outcome(step.name, "no time left", 0, ""))
            return
        now = time.monotonic() - self.start
        print(f"{step.name}: from {now:.0f} s, until {now + limit:.0f} s at most", flush=True)
        try:
            running = Running(step, self.logs / f"{step.name}.log", limit)
        except OSError as error:
            self._add(Outcome(step.name, f"does not start: {error}", 0, ""))
            return
        self.running.append(running)
        if not step.background:
            self._wait(running)

    def _wait(self, awaited: Running | None) -> None:
        """Until a step ends, or all that run; whoever's time is over ends meanwhile."""
        while awaited in self.running if awaited else self.running:
            for running in list(self.running):
                running.read()
                over = running.over
                if running.process.poll() is not None or over:
                    gone = "" if running.process.poll() is not None else over
                    outcome = running.outcome(gone)
                    self.running.remove(running)
                    self._add(outcome)
            if time.monotonic() - self._told > _TOLD:
                self._report()
            time.sleep(_TICK)

    def _add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"{outcome.step}: {outcome.verdict} ({outcome.seconds:.0f} s)", flush=True)
        self._report()

    def _report(self) -> None:
        """Tell of what there is; where that cannot be written now, it may be later."""
        self._told = time.monotonic()
        with suppress(OSError):
            self._tell(self)

    def _print_plan(self) -> None:
        """Each step's seconds and end, as planned for the time there is."""
        seconds = self.end - self.start
        total = sum(x.planned for x in self.steps if not (x.missing or x.background))
        end = 0.0
        print(f"{'plan':<14} {'seconds':>8} {'end':>6}")
        for step in self.steps:
            planned = step.planned * seconds / total if total else 0
            end += 0 if step.missing or step.background else planned
            what = step.missing and f"  not here: {step.missing}"
            what = what or ("  beside the next ones" if step.background else "")
            print(f"{step.name:<14} {0 if step.missing else planned:8.0f} {end:6.0f}{what}")
        sys.stdout.flush()


def heed_requests_to_end() -> None:
    """Let a request to end this process end the running steps, and a second one disturb nothing."""

    def interrupted(*_: object) -> None:
        for request in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(request, signal.SIG_IGN)
        raise KeyboardInterrupt

    for request in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(request) is not signal.SIG_IGN:  # as nohup has it
            signal.signal(request, interrupted)
