"""Programs for a GPU: the tasks that compile beforehand, the sweep, the profile; without a GPU."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources

from dense_attn.benchmarks.gpu import prewarm, profile, program, real_sizes, sweep
from dense_attn.benchmarks.gpu.real_sizes import Case
from dense_attn.benchmarks.harness import dry_run, machine
from dense_attn.triton_kernels import configs, layout_attention
from dense_attn.triton_kernels.layout_attention import lists

RUN = program.Run(dry=True)


@pytest.fixture(autouse=True)
def _gpu(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A stand-in for a GPU."""
    monkeypatch.setattr(machine, "_current", dry_run.DryGpu())


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


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
    assert profile.parse('"ID","Kernel Name"\n') == []


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
    """Answers to what a launch asks of a device before its kernel is compiled, and no more."""

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
        for kernel in (lists.tile_lists_kernel, lists.word_bounds_kernel):
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


@pytest.mark.parametrize(
    ("cores", "gigabytes", "count"),
    [(16, 128, 14), (64, 512, 14), (16, 32, 10), (16, 2, 8), (2, 8, 1), (1, 8, 1)],
)
def test_processes_fit_cores_and_memory(
    cores: int, gigabytes: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = {"SC_PHYS_PAGES": gigabytes << 18, "SC_PAGE_SIZE": 1 << 12}
    monkeypatch.setattr(prewarm.os, "sched_getaffinity", lambda process: range(cores))
    monkeypatch.setattr(prewarm.os, "sysconf", pages.__getitem__)
    assert prewarm.processes(dry=False) == count
    assert prewarm.processes(dry=True) == 1


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


def test_tasks_launch_no_kernel_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of CUDA's has Triton's gradient, whose kernels are compiled by a row of Triton's."""
    monkeypatch.setattr(prewarm.table, "missing", lambda backend, op: None)
    monkeypatch.setattr(prewarm.table, "why_not", lambda backend, op, x, *_: [])
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    rows = [row for row in prewarm.suite.entries(quick=True) if row.ours]
    assert {prewarm.suite.backend(row) for row in rows} == {"triton", "cuda"}
    names = [name for name, _ in prewarm.tasks() if name.startswith("bench-")]
    assert names == [f"bench-{row}" for row in dict.fromkeys(map(prewarm._by_triton, rows))]
    assert {prewarm.suite.backend(prewarm._by_triton(row)) for row in rows} == {"triton"}
    assert "bench-sd15-cross-64-bwd-bfloat16-dense_attn-triton" in names
    assert "bench-sd15-self-64-fwd-bfloat16-dense_attn-sorted" in names
