"""`make gpu`: its plan, a dry run, and what it leaves when steps fail or it is ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import forked
import gpu
import gpu_build
import gpu_plan
import pytest
import torch
import tree

from dense_attn.benchmarks.families import GPU_FAMILIES
from dense_attn.benchmarks.layout_attention.gpu_baselines import GPU_CONTENDERS

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / ".ci" / "gpu.py"
DRY = [sys.executable, str(DRIVER), "--dry-run"]


def planned(*argv: str, folder: Path = Path("x")) -> dict[str, gpu_plan.Step]:
    """The steps of a command line by name."""
    return {step.name: step for step in gpu_plan.steps(gpu._parse(argv), folder)}


def dry_run(tmp_path: Path, *argv: str) -> tuple[dict, str, set[str]]:
    """The results of a dry run that passes, its output, and the files in its archive."""
    result = subprocess.run(
        [*DRY, "--output", str(tmp_path), *argv],
        env=os.environ | {"CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", "gpu.tar.gz"}
    with tarfile.open(tmp_path / "gpu.tar.gz") as archive:
        names = {name.removeprefix("gpu/") for name in archive.getnames()}
    return json.loads((tmp_path / "gpu.json").read_text()), result.stdout, names


def only(*names: str) -> list[str]:
    return [word for name in names for word in ("--only", name)]


@pytest.mark.full
@pytest.mark.long  # the whole dry run has these too
def test_a_dry_run_of_three_steps(tmp_path: Path) -> None:
    """Rows come as they are made; the plan and the limits are printed."""
    pytest.importorskip("triton")
    pytest.importorskip("pytest_benchmark")
    found, output, names = dry_run(tmp_path, *only("build", "cpu-kernels", "real-sizes"))
    steps = {step["step"]: step for step in found["steps"]}
    assert steps["build"]["verdict"] == steps["real-sizes"]["verdict"] == "passed"
    reason = "not here: no C++ compiler: the library runs without its CPU kernels"
    assert steps["cpu-kernels"]["verdict"] == reason
    *cases, last = steps["real-sizes"]["rows"]
    assert {row["right"] for row in cases} == {True}
    assert (last["wrong"], last["not_reached"]) == ([], [])
    assert f"real-sizes {json.dumps(cases[0])[:200]}" in output
    assert "real-sizes: from " in output
    assert names == {"gpu.json", "build.log", "cpu-kernels.log", "real-sizes.log"}
    assert (gpu_build.LIBRARY / "dense_attn" / "benchmarks" / "gpu" / "sweep.py").is_file()


@pytest.mark.full
def test_dry_run(tmp_path: Path) -> None:
    """All steps but verify, which has its own tests; no compiler, the benchmark's smallest part."""
    for package in ("triton", "pytest_benchmark", "matplotlib"):
        pytest.importorskip(package)
    names = only(*(name for name in gpu_plan.PLAN if name != "verify"))
    found, _, files = dry_run(tmp_path, *names, "--family", "launch", "--family", "sega")
    verdicts = {step["step"]: step["verdict"] for step in found["steps"]}
    passed = {name for name, verdict in verdicts.items() if verdict.startswith("passed")}
    programs = {"prewarm", "real-sizes", "sweep", "profile"}
    assert passed == {"environment", "build", "memcheck", "tests", "families", *programs}
    for name in passed - {"environment", "build"}:
        log = (gpu.BUILD / "run" / f"{name}.log").read_text()
        assert f"dense_attn: {gpu_build.LIBRARY / 'dense_attn'}" in log
    assert "every kernel was launched" in (gpu.BUILD / "run" / "memcheck.log").read_text()
    results = found["benchmarks"]["families"]
    assert results["header"]["dry_run"] is True
    assert {row["family"] for row in results["rows"]} == {"launch", "sega"}
    assert {"families.json", "families-sega.png", "tests.log"} <= files


def test_the_plan_fits_its_minutes() -> None:
    steps = planned()
    assert list(steps) == list(gpu_plan.PLAN)
    waited = [step.planned for step in steps.values() if not step.background]
    assert sum(waited) + gpu._RESERVED <= 60 * gpu_plan.MINUTES
    order = [name for name, step in steps.items() if step.quiet]
    assert order == ["own", "sweep", "profile", "families", "rest"]
    beside = [name for name, step in steps.items() if step.background]
    assert beside == ["cpu-kernels", "memcheck", "racecheck"]


def test_families_and_contenders_are_those_of_the_benchmark() -> None:
    assert list(gpu_plan.TESTS) == list(GPU_FAMILIES)
    assert sorted((*gpu_plan.OWN, *gpu_plan.REST)) == sorted(GPU_CONTENDERS)


def test_families_and_contenders_choose_the_rows() -> None:
    steps = planned("--contender", "sdpa", "--contender", "eager", "--family", "attention")
    for name, contender in (("own", "sdpa"), ("rest", "eager")):
        command = steps[name].command
        assert command.count("--contender") == 1
        assert command[command.index("--contender") + 1] == contender
    assert steps["families"].missing == "rows of these families and contenders"
    steps = planned("--family", "sega")
    assert steps["own"].missing == steps["rest"].missing == "rows of these families and contenders"
    assert (steps["families"].missing, steps["families"].command.count("--family")) == ("", 1)


@pytest.mark.parametrize(
    ("argv", "count", "quick"),
    [((), 3, True), (("--minutes", "60"), 7, False), (("--dry-run",), 1, True)],
)
def test_the_driver_finds_its_files(argv: tuple[str, ...], count: int, quick: bool) -> None:
    """Files that are gone end a run on a GPU, whose time is dear."""
    steps = planned(*argv)
    tests = [word for word in steps["tests"].command if word.endswith(".py")]
    assert len(tests) == count
    for path in (*tests, ROOT / "setup.py", ROOT / ".ci" / "gpu_build.py"):
        assert Path(path).is_file(), path
    assert ("--quick" in steps["rest"].command) == quick
    known = tree.modules()
    for name in ("prewarm", "real-sizes", "sweep", "profile", "memcheck"):
        modules = [word for word in steps[name].command if word.startswith("dense_attn.")]
        assert len(modules) == 1
        assert modules[0] in known


def test_wheels_beside_the_project_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "ROOT", tmp_path)
    assert gpu_plan._wheels().missing == "no wheels in .whl/"
    assert not gpu_plan.has("a_package")
    wheel = tmp_path / ".whl" / "a_package-1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.touch()
    assert (gpu_plan._wheels().missing, gpu_plan._wheels().command[-1]) == ("", str(wheel))
    assert gpu_plan.has("a_package")


def test_without_xdist_or_pytest_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_plan, "has", lambda module: module not in ("xdist", "tqdm"))
    steps = planned()
    assert steps["tests"].note == "in one process: xdist is missing"
    assert (steps["tests"].missing, steps["own"].missing) == ("", "tqdm")
    monkeypatch.setattr(gpu_plan, "has", lambda module: module != "pytest")
    assert planned()["tests"].missing == "pytest"
    monkeypatch.setattr(gpu_plan, "has", lambda module: True)
    assert "-n" in planned()["tests"].command


def selected(tmp_path: Path, *argv: str) -> set[tuple[str, str]]:
    """The files of which the tests step takes something, and what it takes of them."""
    step = gpu_plan._tests(gpu._parse(argv), {})
    assert not step.missing
    words = step.command[step.command.index("pytest") + 1 :]
    if "-n" in words:
        del words[words.index("-n") : words.index("-n") + 2]
    result = forked.run(forked.PYTEST, "--collect-only", *words, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    lines = [line.split("::") for line in result.stdout.splitlines() if "::" in line]
    return {(Path(file).name, test) for file, test in lines}


@pytest.mark.full  # a process of its own collects all
@pytest.mark.parametrize("family", ["attention", "sega"])
def test_a_family_has_its_tests_on_a_gpu(family: str, tmp_path: Path) -> None:
    files = {file for file, _ in selected(tmp_path, "--family", family)}
    assert files >= {"test_gpu.py", "triton_backend.py"}
    assert ("test_backends.py" in files) == (family == "attention")


@pytest.mark.full  # a process of its own collects all
def test_a_long_run_takes_both_backends_of_gpus(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    tests = selected(tmp_path, "--minutes", "60")
    for file in ("test_backends.py", "gpu_sega.py", "gpu_steps.py"):
        taken = {test.partition("[")[2] for name, test in tests if name == file}
        for backend in ("whole" if file == "gpu_sega.py" else "triton", "cuda"):
            assert any(backend in parameters for parameters in taken), (file, backend)


def test_a_family_without_tests_says_so() -> None:
    assert planned("--family", "launch")["tests"].missing == "tests of these families"


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


def test_what_is_ended_leaves_no_step_and_its_results(tmp_path: Path) -> None:
    """The request comes while the first step, put in another's place, sleeps."""
    argv = ["--dry-run", *only("environment", "build"), "--output", str(tmp_path / "out")]
    program = f"""
import sys
sys.path[:0] = [{str(DRIVER.parent)!r}]
import pathlib
import gpu, gpu_plan
gpu.BUILD = pathlib.Path({str(tmp_path)!r})
row = 'print(chr(123) + chr(34) + "row" + chr(34) + ": 7}}", flush=True)'
gpu_plan._ENVIRONMENT = f"import os, time; {{row}}; print(os.getpid(), flush=True); time.sleep(60)"
gpu.heed_requests_to_end()
sys.exit(gpu.main({argv!r}))
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.DEVNULL)
    log = tmp_path / "run" / "environment.log"
    deadline = time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[-1]), 0)
    steps = json.loads((tmp_path / "out" / "gpu.json").read_text())["steps"]
    assert [(x["step"], x["verdict"]) for x in steps] == [
        ("environment", "interrupted"),
        ("build", "interrupted"),
    ]
    assert steps[0]["rows"] == [{"row": 7}]
    with tarfile.open(tmp_path / "out" / "gpu.tar.gz") as archive:
        assert "gpu/environment.log" in archive.getnames()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "paint"], "argument --only: invalid choice: 'paint'"),
        (["--minutes", "0"], "argument --minutes: must be a positive number of minutes, got '0'"),
        (["--output", __file__], f"--output must be a folder, got {__file__}"),
        (["--family", "paint"], "argument --family: invalid choice: 'paint'"),
        (["--contender", "paint"], "argument --contender: invalid choice: 'paint'"),
        (["--quick"], "unrecognized arguments: --quick"),
    ],
)
def test_wrong_arguments(argv: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(argv)
    assert message in capsys.readouterr().err
