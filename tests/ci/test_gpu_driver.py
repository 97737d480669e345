"""`make gpu`: a dry run, and what becomes of steps that fail, hang or come too late."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import gpu_steps
import pytest
import torch

from dense_attn.benchmarks.families import GPU_FAMILIES

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / ".ci" / "gpu.py"
DRY = [sys.executable, str(DRIVER), "--dry-run"]


def step(name: str, program: str, **options: object) -> gpu_steps.Step:
    return gpu_steps.Step(name, [sys.executable, "-c", program], **options)


@pytest.mark.full
def test_dry_run(tmp_path: Path) -> None:
    """All steps but verify, which has its own tests; no compiler, the benchmark's smallest part."""
    pytest.importorskip("triton")
    pytest.importorskip("pytest_benchmark")
    command = [*DRY, "--output", str(tmp_path), "--family", "launch"]
    for name in ("environment", "wheels", "build", "tests", "sanitize", "bench"):
        command += ["--only", name]
    result = subprocess.run(
        command, env=os.environ | {"CXX": "no-such-compiler"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    verdicts = {outcome["step"]: outcome["verdict"] for outcome in summary["steps"]}
    passed = [name for name, verdict in verdicts.items() if verdict.startswith("passed")]
    assert passed == ["environment", "build", "tests", "sanitize-memcheck", "bench"]
    assert all(
        name in passed or verdict.startswith("not here: ") for name, verdict in verdicts.items()
    )
    assert verdicts["build"] == "passed, without the CPU kernels: no C++ compiler"
    for name in ("tests", "sanitize-memcheck", "bench"):
        assert f"dense_attn: {gpu.LIBRARY / 'dense_attn'}" in (tmp_path / f"{name}.log").read_text()
    assert " passed" in (tmp_path / "tests.log").read_text()
    assert "every kernel was launched" in (tmp_path / "sanitize-memcheck.log").read_text()
    results = json.loads((tmp_path / "dry-run.json").read_text())
    assert results["header"]["dry_run"] is True
    assert {row["family"] for row in results["rows"]} == {"launch"}


def test_a_folder_that_cannot_be_is_refused() -> None:
    command = [*DRY, "--only", "environment", "--output", "/dev/null/x"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("make gpu: --output must be a folder that can be written: ")
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    result = subprocess.run([sys.executable, str(DRIVER)], capture_output=True, text=True)
    assert result.returncode == 2
    sentence = "make gpu: torch sees no GPU here; ARGS=--dry-run runs every step without one\n"
    assert result.stderr == sentence


def test_a_step_with_another_dense_attn_fails(tmp_path: Path) -> None:
    for name, text in (("dense_attn", ""), ("module", "import dense_attn"), ("idle", "")):
        (tmp_path / f"{name}.py").write_text(text)
    environment = {"PYTHONPATH": str(tmp_path)}
    steps = [
        gpu_steps.Step(name, gpu._built(name), environment=environment)
        for name in ("module", "idle")
    ]
    assert [outcome.verdict for outcome in gpu_steps.run(steps, tmp_path)] == ["exit code 1"] * 2
    rule = f"dense_attn must be the one in {gpu.LIBRARY}, got"
    assert (tmp_path / "module.log").read_text().endswith(f"{rule} {tmp_path / 'dense_attn.py'}\n")
    assert (tmp_path / "idle.log").read_text().endswith(f"{rule} None\n")


def test_the_families_are_those_of_the_benchmark() -> None:
    assert list(gpu.TESTS) == list(GPU_FAMILIES)


@pytest.mark.parametrize(("argv", "count"), [([], 6), (["--quick"], 3), (["--dry-run"], 1)])
def test_the_driver_finds_its_files(argv: list[str], count: int, tmp_path: Path) -> None:
    """Files that are gone end a run on a GPU, whose time is dear."""
    assert gpu_steps.ROOT == ROOT
    step = next(x for x in gpu._steps(gpu._parse(argv), "a GPU", tmp_path) if x.name == "tests")
    tests = [word for word in step.command if word.endswith(".py")]
    assert len(tests) == count
    for path in (*tests, ROOT / "setup.py", ROOT / "dense_attn" / "_files.py"):
        assert Path(path).is_file(), path


def test_wheels_beside_the_project_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu._wheels().missing == "no wheels in .whl/"
    wheel = tmp_path / ".whl" / "a-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert (gpu._wheels().missing, gpu._wheels().command[-1]) == ("", str(wheel))


def selected(tmp_path: Path, *argv: str) -> set[str]:
    """The files of which the tests step takes something."""
    step = gpu._tests(gpu._parse(argv), {})
    assert not step.missing
    options = step.command[step.command.index("pytest") + 1 :]
    command = [sys.executable, "-m", "pytest", "--collect-only", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    return {Path(line.split("::")[0]).name for line in result.stdout.splitlines() if "::" in line}


@pytest.mark.parametrize("family", ["attention", "sega"])
def test_a_family_has_its_tests_on_a_gpu(family: str, tmp_path: Path) -> None:
    files = selected(tmp_path, "--family", family, "--quick")
    assert files >= {"test_gpu.py", "triton_backend.py"}
    assert ("test_backends.py" in files) == (family == "attention")


def test_a_family_without_tests_says_so() -> None:
    assert gpu._tests(gpu._parse(["--family", "launch"]), {}).missing == "tests of these families"


def test_what_is_ended_leaves_no_step_and_a_summary(tmp_path: Path) -> None:
    """The request comes while the first step, put in another's place, sleeps."""
    argv = ["--dry-run", "--only", "environment", "--only", "build", "--output", str(tmp_path)]
    program = f"""
import sys
sys.path[:0] = [{str(DRIVER.parent)!r}]
import gpu
gpu._ENVIRONMENT = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
gpu.heed_requests_to_end()
sys.exit(gpu.main({argv!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    log = tmp_path / "environment.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 1):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    assert ends(int(log.read_text().split()[-1]))
    steps = json.loads((tmp_path / "summary.json").read_text())["steps"]
    assert {outcome["step"]: outcome["verdict"] for outcome in steps} == dict.fromkeys(
        ("environment", "build"), "interrupted"
    )


def ends(process: int) -> bool:
    """Whether a process is gone, now or soon."""
    state = Path(f"/proc/{process}/stat")
    for _ in range(50):
        if not state.exists() or state.read_text().split()[2] == "Z":
            return True
        time.sleep(0.1)
    return False


def test_a_failing_step_is_told_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    steps = [
        step("one", "print('why'); raise SystemExit(3)"),
        step("two", "print('fine')"),
        step("three", "", missing="x"),
    ]
    outcomes = gpu_steps.run(steps, tmp_path)
    assert [outcome.verdict for outcome in outcomes] == ["exit code 3", "passed", "not here: x"]
    assert [outcome.failed for outcome in outcomes] == [True, False, False]
    assert "  why\n" in capsys.readouterr().out
    assert (tmp_path / "two.log").read_text().endswith("fine\n")


def test_a_step_that_hangs_ends_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE", 0.5)
    sleep = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    program = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {sleep!r}]); "
        "print(p.pid); sys.stdout.flush(); p.wait()"
    )
    (outcome,) = gpu_steps.run([step("hangs", program, most=2, least=0)], tmp_path)
    assert outcome.verdict == "ran past 2 s"
    assert ends(int((tmp_path / "hangs.log").read_text().split()[-1]))


def test_later_steps_keep_their_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "GRACE", 1)
    wait = "import time; time.sleep(60)"
    steps = [step("long", wait, least=0), step("last", "", least=2), step("late", "", least=90)]
    verdicts = [outcome.verdict for outcome in gpu_steps.run(steps[:2], tmp_path, seconds=5)]
    assert verdicts == ["ran past 2 s", "passed"]
    verdicts = [outcome.verdict for outcome in gpu_steps.run(steps[1:], tmp_path, seconds=5)]
    assert verdicts == ["no time left"] * 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "paint"], "argument --only: invalid choice: 'paint'"),
        (["--minutes", "0"], "argument --minutes: must be a positive number of minutes, got '0'"),
        (["--output", __file__], f"--output must be a folder, got {__file__}"),
        (["--family", "paint"], "argument --family: invalid choice: 'paint'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(argv)
    assert message in capsys.readouterr().err
