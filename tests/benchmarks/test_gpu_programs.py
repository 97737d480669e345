"""The programs for a GPU see what is wrong, and say what they could not do; without a GPU."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from dense_attn.benchmarks.gpu import prewarm, profile, program, real_sizes, sweep
from dense_attn.benchmarks.gpu.real_sizes import Case
from dense_attn.benchmarks.harness import dry_run, machine
from dense_attn.triton_kernels import configs, layout_attention

CASE = Case(40, "float32", True, side=12, heads=1)
RUN = program.Run(dry=True)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A stand-in for a GPU."""
    monkeypatch.setattr(machine, "_current", dry_run.DryGpu())


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def spoiled(spoil: Callable[[Tensor, int], None]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Layout attention whose result is spoiled, by its place in the calls that are not the
    reference's in float64.
    """
    calls = iter(range(100))

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(context: object, out: Tensor) -> Tensor:
            out = out.clone()
            spoil(out, next(calls))
            return out

        @staticmethod
        def backward(context: object, grad: Tensor) -> Tensor:
            return grad

    def call(*arguments: Tensor, backend: str, **options: object) -> tuple[Tensor, Tensor]:
        out, lse = real_sizes_attention(*arguments, backend="reference", **options)
        return (Spoil.apply(out) if backend == "spoiled" else out), lse

    return call


real_sizes_attention = real_sizes.layout_attention


def nothing(out: Tensor, call: int) -> None:
    """Leaves the result as it is."""


def one_element(out: Tensor, call: int) -> None:
    out[-1, -1, -1, -1] += 0.01


def unwritten(out: Tensor, call: int) -> None:
    out[0, 0, 7, 3] = torch.nan


def unsteady(out: Tensor, call: int) -> None:
    out[0, 0, 7, 3] += 1e-7 * call


@pytest.mark.parametrize(
    ("spoil", "right", "finite", "steady"),
    [
        (nothing, True, True, True),
        (one_element, False, True, True),
        (unwritten, False, False, True),
        (unsteady, False, True, False),
    ],
)
def test_a_wrong_result_is_seen(
    spoil: Callable, right: bool, finite: bool, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_sizes, "layout_attention", spoiled(spoil))
    row = real_sizes.check_attention(CASE, backend="spoiled")
    found = (row["right"], row["all_finite"], row["changed_elements"] == 0)
    assert found == (right, finite, steady)
    assert set(row["ratios"]) == set(real_sizes.RESULTS)
    assert (row["ratios"]["out"] > 1) == (spoil in (one_element, unwritten))


def test_new_memory_is_poisoned() -> None:
    with real_sizes.poisoned_memory():
        assert torch.empty(100, dtype=torch.float32, device="cpu").isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_near_ties_are_not_sampled() -> None:
    inputs = CASE.inputs()
    rows = real_sizes.clear_rows(inputs, [0, 1])
    assert 100 < len(rows) <= 144
    inputs.k[:, :, 1] = inputs.k[:, :, 0]  # a tie wherever key 0 is largest or smallest
    scores = (inputs.q @ inputs.k.mT).flatten(0, 1)
    tied = ((scores.argmax(-1) < 2) | (scores.argmin(-1) < 2)).any(0).nonzero()[:, 0]
    assert len(tied)
    assert not set(tied.tolist()) & set(real_sizes.clear_rows(inputs, [0, 1]).tolist())


def test_wrong_and_unreached_cases_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fails() -> dict:
        raise RuntimeError("an illegal address\nand more")

    cases = [("good", lambda: {"right": True}), ("bad", lambda: {"right": False}), ("ill", fails)]
    monkeypatch.setattr(real_sizes, "checks", lambda dry: iter(cases))
    assert real_sizes.main(RUN) == 1
    *rows, last = lines(capsys.readouterr().out)
    assert [row["right"] for row in rows] == [True, False, False]
    assert rows[2]["error"] == "RuntimeError: an illegal address"
    assert (last["wrong"], last["not_reached"]) == (["bad", "ill"], [])
    monkeypatch.setattr(real_sizes, "checks", lambda dry: iter(cases[:1]))
    assert real_sizes.main(RUN) == 0
    assert real_sizes.main(program.Run(dry=True, end=time.monotonic())) == 1
    assert lines(capsys.readouterr().out)[-1]["not_reached"] == ["good"]


def test_the_cases_of_a_gpu() -> None:
    cases = real_sizes.attention_cases()
    selves = {(x.head_dim, x.dtype, x.ordered) for x in cases if x.kind == "self"}
    assert selves == {(d, t, o) for d in (40, 64, 128) for t in real_sizes.DTYPES for o in (0, 1)}
    assert all(x.side**2 == 4096 for x in cases)
    assert {x.head_dim for x in cases if x.kind == "cross"} == {40, 64, 128}
    names = [name for name, _ in real_sizes.checks(dry=False)]
    assert len(set(names)) == len(names) == len(cases) + 6


def test_the_sweep_tries_stages_tiles_and_parking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    trials = sweep.trials()
    assert len(set(map(str, trials))) == len(trials)
    for head_dim in sweep.HEAD_DIMS:
        for ordered in (True, False):
            case = Case(head_dim, "bfloat16", ordered)
            mine = [x.config for x in trials if (x.case, x.kernel) == (case, "fwd")]
            assert mine[0] == configs.layout_attention_fwd("sm_90", "half", head_dim, 4096)
            assert {x.num_stages for x in mine} == {2, 3, 4, 5}
            assert {x.parks for x in mine} == {True, False}
            assert len({(x.BLOCK_M, x.BLOCK_N) for x in mine}) >= 4
        keys = [x for x in trials if x.kernel == "bwd_kv" and x.case.head_dim == head_dim]
        assert {x.config.num_stages for x in keys} == {2, 3, 4, 5}


def test_the_sweep_tells_wrong_results_and_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    right = torch.ones(3, dtype=torch.float16, device="cpu")

    def call_of(case: Case, kernel: str, config: configs.Config | None) -> Callable:
        stages = config.num_stages if config else 0
        if stages == 5:
            raise OutOfResources(300_000, 232_448, "shared memory")
        if stages == 4:
            raise ValueError("no such layout")
        return lambda: (right + (0.5 if stages == 3 else 0),)

    monkeypatch.setattr(sweep, "call_of", call_of)
    case = Case(40, "float16", side=12)
    trials = [sweep.Trial(case, "fwd", configs.Config(64, 32, 4, n)) for n in (2, 3, 4, 5)]
    monkeypatch.setattr(sweep, "trials", lambda dry: trials)
    monkeypatch.setattr(sweep.autotune, "seconds", lambda call: 1e-3)
    assert sweep.main(RUN) == 1
    two, three, four, five, last = lines(capsys.readouterr().out)
    assert (two["seconds"], two.get("wrong"), three["wrong"]) == (1e-3, None, True)
    assert "shared memory" in five["reason"]
    assert four["reason"].startswith("ValueError")
    assert last["wrong"] == [str(trials[1])]
    assert last["best"] == {f"fwd-{case}": [1e-3, str(trials[0])]}
    assert sweep.main(program.Run(dry=True, end=time.monotonic())) == 0
    assert lines(capsys.readouterr().out)[-1]["not_reached"] == 4


def test_a_lost_device_costs_one_case(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The rest goes on in a process of its own."""
    cases = [(str(n), lambda: {"right": True}) for n in range(3)]
    monkeypatch.setattr(real_sizes, "checks", lambda dry: iter(cases))

    def lost() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    commands = []

    def process(command: list[str], check: bool) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(machine.current(), "synchronize", lost, raising=False)
    monkeypatch.setattr(program.subprocess, "run", process)
    monkeypatch.setattr(sys, "argv", ["real_sizes", "--dry-run"])
    end = time.monotonic() + 100
    assert real_sizes.main(program.Run(dry=True, first=1, end=end)) == 1
    found, continued, last = lines(capsys.readouterr().out)
    assert (found["case"], continued, last["wrong"]) == ("1", {"continued_at": 2}, ["1"])
    ((*start, seconds),) = commands
    rest = ["--dry-run", "--first", "2", "--seconds"]
    assert start == [sys.executable, "-m", real_sizes.MODULE, *rest]
    assert 90 < float(seconds) <= 100


COUNTERS = """==PROF== Connected to process 1
{"case": "of the program itself"}
"ID","Kernel Name","launch__registers_per_thread","smsp__issue_active.avg.pct","other"
"","","register/thread","%",""
"0","layout_attention_fwd_kernel","191","40.5","256"
"1","layout_attention_fwd_kernel","191","41.5","256"
"""


def test_counters_are_read() -> None:
    counters = {"launch__registers_per_thread": "191 register/thread"}
    expected = [counters | {"smsp__issue_active.avg.pct": f"{x} %"} for x in ("40.5", "41.5")]
    assert profile.parse(COUNTERS) == [("layout_attention_fwd_kernel", x) for x in expected]
    many = COUNTERS + "".join(COUNTERS.splitlines(keepends=True)[-2:]) * 3
    assert profile.parse(many) == [(name, expected[1]) for name in profile.KERNELS]
    assert profile.parse("==ERROR== ERR_NVGPUCTRPERM") == []


def test_without_counters_the_profile_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    ncu = tmp_path / "ncu"
    ncu.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM: no permission'\nexit 1\n")
    ncu.chmod(0o755)
    run = program.Run(options=argparse.Namespace(launch=False))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert profile.main(run) == program.SKIPPED
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "ncu read no counters ==ERROR== ERR_NVGPUCTRPERM: no permission"
    ncu.unlink()
    assert profile.main(run) == program.SKIPPED
    assert capsys.readouterr().out == "ncu is missing\n"


class NoDevice:
    """What a launch asks of a device before its kernel is compiled, and no more."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def test_a_task_compiles_and_launches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoDevice())
    words = torch.empty(4096, dtype=torch.int32, device="meta")

    def forget() -> None:
        for kernel in (layout_attention.tile_lists_kernel, layout_attention.word_bounds_kernel):
            kernel.device_caches.clear()

    def compiled() -> program.Compilations:
        forget()
        with program.Compilations() as compilations:
            layout_attention.tile_lists(words, words, None, None, 128, 64)
        return compilations

    with prewarm.compile_only():
        assert (compiled().made, compiled().made) == (3, 0)
        assert compiled().found == 3
    files = {path.stem for path in tmp_path.rglob("*.cubin")}
    assert files == {"word_bounds_kernel", "tile_lists_kernel"}
    with pytest.raises(AttributeError):  # there is nothing to launch it on
        compiled()
    forget()


def test_processes_share_all_tasks_and_one_that_fails_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    done = []

    def fails() -> None:
        raise ValueError("a layout")

    tasks = [(str(n), lambda n=n: done.append(n)) for n in range(5)] + [("bad", fails)]
    monkeypatch.setattr(prewarm, "tasks", lambda dry: tasks)
    monkeypatch.setattr(prewarm.table, "unavailable", lambda backend, op: None)
    codes = []
    for worker in (0, 1):
        options = argparse.Namespace(worker=worker, processes=2)
        codes.append(prewarm.main(program.Run(dry=True, options=options)))
    assert (sorted(done), codes) == ([0, 1, 2, 3, 4], [0, 1])
    rows = lines(capsys.readouterr().out)
    assert {row["task"] for row in rows} == {name for name, _ in tasks}
    assert [row["failed"] for row in rows if "failed" in row] == ["ValueError: ['a layout']"]


def test_the_tasks_are_those_of_the_later_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    names = [name for name, _ in prewarm.tasks()]
    assert len(set(names)) == len(names)
    for case in real_sizes.attention_cases():
        assert f"real-sizes-{case}" in names
    for trial in sweep.trials():
        assert f"sweep-{trial}" in names
    for start in ("bench-sd15-self-64-fwd-bfloat16-dense_attn", "small-", "verify-self", "sega"):
        assert any(name.startswith(start) for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_program_says_so() -> None:
    command = [sys.executable, "-m", real_sizes.MODULE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    sentence = "real_sizes: a GPU must be there, torch sees none (--dry-run needs none)\n"
    assert done.stderr == sentence
