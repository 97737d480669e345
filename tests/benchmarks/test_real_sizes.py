"""Cases at real sizes: a wrong result, one that changes, one that is not written, are seen."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
pytest.importorskip("pytest_benchmark")

from dense_attn.benchmarks.gpu import program, real_sizes
from dense_attn.benchmarks.gpu.real_sizes import Case
from dense_attn.benchmarks.harness import dry_run, machine

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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_program_says_so() -> None:
    command = [sys.executable, "-m", real_sizes.MODULE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    sentence = "real_sizes: a GPU must be there, torch sees none (--dry-run needs none)\n"
    assert done.stderr == sentence
