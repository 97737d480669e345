"""Steps that fail, hang, come too late or say too much, and the files that tell of them."""

from __future__ import annotations

import json
import re
import sys
import tarfile
import time
from pathlib import Path

import gpu_build
import gpu_plan
import gpu_report
import gpu_steps
import pytest
from gpu_steps import Outcome, Runner


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE", 0.5)


def step(name: str, program: str, **options: object) -> gpu_steps.Step:
    options = {"folder": Path("/tmp")} | options
    return gpu_steps.Step(name, [sys.executable, "-c", program], **options)


def run(steps: list[gpu_steps.Step], folder: Path, seconds: float = 60) -> dict[str, Outcome]:
    outcomes = Runner(steps, folder / "logs", seconds, lambda runner: None).run()
    return {outcome.step: outcome for outcome in outcomes}


def verdicts(*arguments: object, **named: object) -> list[str]:
    return [outcome.verdict for outcome in run(*arguments, **named).values()]


def ends(process: int) -> bool:
    """Whether a process is gone, now or soon."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


SLEEP = "import time; time.sleep(60)"


def test_a_failing_step_is_told_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    steps = [
        step("one", "print('why'); raise SystemExit(3)"),
        step("two", "print('fine')"),
        step("three", "", missing="x"),
        step("four", f"print('no counters'); raise SystemExit({gpu_steps.SKIPPED})"),
        step("hint", "raise SystemExit(9)", lead=9, note="or none"),
        step("five", "", folder=tmp_path / "logs" / "two.log"),
    ]
    found = run(steps, tmp_path)
    expected = ["exit code 3", "passed", "not here: x", "not here: no counters"]
    expected.append("a lead: exit code 9, or none")
    *most, last = found.values()
    assert [outcome.verdict for outcome in most] == expected
    assert last.verdict.startswith("does not start: ")
    failed = [outcome.failed for outcome in found.values()]
    assert failed == [True, False, False, False, False, True]
    output = capsys.readouterr().out
    assert "  why\n" in output
    assert re.search(r"^two: from \d+ s, until \d", output, re.MULTILINE)
    assert (tmp_path / "logs" / "two.log").read_text().endswith("fine\n")


def test_a_step_that_hangs_ends_with_its_children(tmp_path: Path) -> None:
    sleep = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); {SLEEP}"
    program = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {sleep!r}]); "
        "print(p.pid); sys.stdout.flush(); p.wait()"
    )
    found = run([step("hangs", program), step("next", "")], tmp_path, seconds=4)
    assert found["hangs"].verdict == "ran past 2 s"
    assert ends(int((tmp_path / "logs" / "hangs.log").read_text().split()[-1]))
    assert found["next"].verdict == "passed"


def test_steps_share_the_time_as_planned(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Later ones have what an early one leaves, and no more."""
    steps = [
        step("a", "", planned=1, missing="x"),
        step("b", SLEEP, planned=1),
        step("c", "", planned=1),
        step("d", "", planned=2),
    ]
    found = run(steps, tmp_path, seconds=8)
    assert [x.verdict for x in found.values()][1:] == ["ran past 2 s", "passed", "passed"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:5]] == [
        ["a", "0", "0", "not", "here:", "x"],
        ["b", "2", "2"],
        ["c", "2", "4"],
        ["d", "4", "8"],
    ]
    assert any(line.startswith("d: from ") and line.endswith("until 8 s at most") for line in lines)


def test_without_time_a_step_does_not_start(tmp_path: Path) -> None:
    assert verdicts([step("late", "")], tmp_path, seconds=0.5) == ["no time left"]


def test_rows_come_as_they_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """A report is made while a step runs, and what a row tells outlasts the end of its time."""
    told = []
    wait = f"import sys; print('{{\"case\": 1}}\\n{{no row', flush=True); {SLEEP}"
    partial = step("partial", wait, partial=True)
    runner = Runner([partial], tmp_path / "logs", 2, told.append)
    (outcome,) = runner.run()
    assert outcome.rows == [{"case": 1}]
    assert outcome.verdict == "ended after 2 s, its rows are kept"
    assert not outcome.failed
    assert 'partial {"case": 1}' in capsys.readouterr().out
    assert told == [runner, runner]
    wrong = wait.replace('"case": 1', '"right": false')
    assert verdicts([step("wrong", wrong, partial=True)], tmp_path, seconds=2) == [
        "1 wrong rows, and its time ended"
    ]


def test_wrong_rows_of_a_benchmark_that_ends_are_seen(tmp_path: Path) -> None:
    rows = tmp_path / "own.json"
    rows.write_text(json.dumps({"rows": [{"wrong": True}, {"seconds": 1}]}))
    ended = step("own", SLEEP, partial=True, rows=rows)
    assert verdicts([ended], tmp_path, seconds=1.5) == ["1 wrong rows, and its time ended"]


def test_a_timed_step_knows_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_steps, "TO_END", 3)
    program = "import sys; print('{\"seconds\": ' + sys.argv[-1] + '}')"
    found = run([step("timed", program, timed=True)], tmp_path, seconds=20)
    assert found["timed"].rows == [{"seconds": 17}]


def test_nothing_runs_beside_what_is_timed(tmp_path: Path) -> None:
    """A step in the background takes no time from those beside it."""
    clock = "import time; print('{\"at\": %f}' % time.monotonic(), flush=True)"
    slow = f"import time; time.sleep(1.5); {clock}"
    steps = [
        step("slow", slow, background=True),
        step("beside", clock),
        step("quiet", clock, quiet=True),
    ]
    found = run(steps, tmp_path)
    assert {x.verdict for x in found.values()} == {"passed"}
    at = {name: outcome.rows[0]["at"] for name, outcome in found.items()}
    assert at["beside"] < at["slow"] < at["quiet"]
    late = [step("never", SLEEP, background=True, planned=1), step("quiet", "", quiet=True)]
    assert verdicts(late, tmp_path, seconds=20) == ["ran past 2 s", "passed"]


def test_a_log_that_is_too_long_ends_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "LONGEST_LOG", 10_000)
    endless = "while True: print('x' * 1000)"
    assert verdicts([step("long", endless)], tmp_path, seconds=20) == ["its log is too long"]


def test_a_report_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    def full(runner: Runner) -> None:
        if len(runner.outcomes) < 2:
            raise OSError("no room")

    runner = Runner([step("a", ""), step("b", "")], tmp_path / "logs", 20, full)
    assert [outcome.verdict for outcome in runner.run()] == ["passed", "passed"]


def test_the_archive_holds_the_ends_of_long_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "LONGEST", 100)
    logs, output = tmp_path / "logs", tmp_path / "out"
    output.mkdir()
    report = gpu_report.Report(output, logs, {"device": "none"})
    program = "print('first' + 'x' * 1000 + 'last'); print('{\"case\": 1}')"
    runner = Runner([step("a", program)], logs, 20, report.write)
    runner.run()
    (logs / "own.json").write_text('{"rows": [7]}')
    report.write(runner)
    found = json.loads((output / "gpu.json").read_text())
    assert found["device"] == "none"
    assert [(x["step"], x["rows"]) for x in found["steps"]] == [("a", [{"case": 1}])]
    assert found["benchmarks"] == {"own": {"rows": [7]}, "families": None, "rest": None}
    with tarfile.open(output / "gpu.tar.gz") as archive:
        log = archive.extractfile("gpu/a.log").read()
        assert json.loads(archive.extractfile("gpu/gpu.json").read()) == found
    assert len(log) < 150
    assert b"left out" in log
    assert log.endswith(b'last\n{"case": 1}\n')


def test_a_step_with_another_dense_attn_fails(tmp_path: Path) -> None:
    for name, text in (("dense_attn", ""), ("module", "import dense_attn"), ("idle", "")):
        (tmp_path / f"{name}.py").write_text(text)
    environment = {"PYTHONPATH": str(tmp_path)}
    steps = [
        gpu_steps.Step(name, gpu_plan.built(name), environment=environment, folder=tmp_path)
        for name in ("module", "idle")
    ]
    assert verdicts(steps, tmp_path) == ["exit code 1"] * 2
    rule = f"dense_attn must be the one in {gpu_build.LIBRARY}, got"
    logs = tmp_path / "logs"
    assert (logs / "module.log").read_text().endswith(f"{rule} {tmp_path / 'dense_attn.py'}\n")
    assert (logs / "idle.log").read_text().endswith(f"{rule} None\n")
