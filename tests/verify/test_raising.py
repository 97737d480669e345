"""A backend that raises has failed `verify`, with its words; others are checked all the same."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dense_attn import layout_attention, reference
from dense_attn.__main__ import main
from dense_attn._backends import choice, table
from dense_attn.verify import accuracy, calls, reversible, run, sega
from dense_attn.verify import layout_attention as attention

pytestmark = pytest.mark.usefixtures("one_thread", "gpu")
GPU = "NVIDIA A100"
OPS = [name for name, value in vars(reference).items() if callable(value)]
BROKEN = "an illegal memory access was encountered\nCUDA kernel errors might be reported later"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backends "cuda" and "triton" that are the reference, on a GPU of a name; one small call."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(choice, "_found", {})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(table, "unavailable", lambda backend, op: None)
    monkeypatch.setattr(table, "why_not", lambda backend, op, x, *_: [])
    monkeypatch.setattr(table, "device_of", lambda backend: "cpu")
    devices = SimpleNamespace(**vars(table))
    devices.device_of = lambda backend: "cuda" if backend in choice.GPU_BACKENDS else "cpu"
    monkeypatch.setattr(run, "table", devices)
    functions = {name: getattr(reference, name) for name in OPS}
    for backend in choice.GPU_BACKENDS:
        monkeypatch.setitem(table.NAMESPACES, backend, SimpleNamespace(**functions, AUTOGRAD=True))
    first = list(calls.calls())[:1]
    monkeypatch.setattr(calls, "calls", lambda: iter(first))
    monkeypatch.setattr(calls, "layout_attention", by_the_reference)
    monkeypatch.setattr(attention, "MODULATIONS", ("range",))
    monkeypatch.setattr(sega, "SHAPES", ((1, 2, 9, 7),))
    monkeypatch.setattr(reversible, "STEPS", 2)
    for module in (attention, sega, reversible):
        monkeypatch.setattr(module, "DTYPES", (torch.float32,))


def by_the_reference(*tensors: Tensor, backend: str, **options: object) -> tuple[Tensor, Tensor]:
    return layout_attention(*tensors, backend="reference", **options)


def breaks(*_: object, **__: object) -> None:
    raise RuntimeError(BROKEN)


def rows(out: str, backend: str) -> Iterator[bool]:
    """Whether each row of a backend failed."""
    return ("FAILED" in line for line in out.splitlines() if line.startswith(f"{backend} "))


def test_what_raises_in_attention_has_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def raising(*tensors: Tensor, backend: str, **options: object) -> tuple[Tensor, Tensor]:
        return (breaks if backend == "cuda" else by_the_reference)(
            *tensors, backend=backend, **options
        )

    monkeypatch.setattr(calls, "layout_attention", raising)
    assert run.main(("cuda", "triton", "cpu")) == 1
    out = capsys.readouterr().out
    assert f"FAILED (cross-attention: RuntimeError: {' '.join(BROKEN.split())})" in out
    assert [*rows(out, "cuda")] == [True] + 6 * [False]
    assert [*rows(out, "triton")] == 7 * [False]
    assert [*rows(out, "cpu")] == 7 * [False]
    assert "1 rows FAILED" in out
    assert choice.gpus("cuda") == {GPU: False}
    assert choice.gpus("triton") == {GPU: True}
    assert choice.order("sega_guidance", _there())[-1] == "cuda"


@pytest.mark.parametrize(
    ("op", "failed"),
    [("percentile_mask", 1), ("sega_guidance", 2), ("leapfrog_step", 1), ("exact_mix", 1)],
)
def test_what_raises_in_other_ops_has_failed(
    op: str, failed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(table.NAMESPACES["cuda"], op, breaks)
    assert run.main(("cuda", "triton")) == 1
    out = capsys.readouterr().out
    assert out.count("FAILED (RuntimeError: an illegal memory access") == failed
    assert sum(rows(out, "cuda")) == failed
    assert [*rows(out, "triton")] == 7 * [False]
    assert (choice.gpus("cuda"), choice.gpus("triton")) == ({GPU: False}, {GPU: True})


def test_a_gpu_that_is_lost_is_not_held_against_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """They are checked in a process of their own, which keeps its own verdict."""
    started: list[list[str]] = []

    def start(command: list[str], check: bool) -> None:
        started.append(command)

    def lost(*tensors: Tensor, backend: str, **options: object) -> tuple[Tensor, Tensor]:
        """After the first backend every other one raises too."""
        return (breaks if backend in choice.GPU_BACKENDS else by_the_reference)(
            *tensors, backend=backend, **options
        )

    monkeypatch.setattr(calls, "layout_attention", lost)
    monkeypatch.setattr(torch.cuda, "synchronize", breaks)
    monkeypatch.setattr(run.subprocess, "run", start)
    assert run.main(("cuda", "triton", "cpu")) == 1
    command = [sys.executable, "-m", "dense_attn", "verify", "--backend=triton"]
    assert started == [command]
    assert (choice.gpus("cuda"), choice.gpus("triton")) == ({GPU: False}, {})
    out = capsys.readouterr().out
    assert "triton again, in a process of its own: the GPU is lost to this one" in out
    assert "remembered: triton" not in out


def test_the_command_checks_the_backends_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(run, "main", lambda backends: asked.append(backends) or 0)
    assert main(["verify", "--backend=triton", "--backend=cpu"]) == 0
    assert main(["verify"]) == 0
    assert asked == [["triton", "cpu"], None]


def test_calls_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made, (given,) = [], calls.calls()
    monkeypatch.setattr(calls, "calls", lambda: made.append(given) or iter([given]))
    assert run.main(("cuda", "cpu")) == 0
    assert made == [given]


def test_whatever_is_raised_is_told_on_one_line() -> None:
    def make(backend: str, dtype: torch.dtype, what: str) -> accuracy.Verdict:
        raise AssertionError("two\nlines " + "x" * 1000)

    verdict = accuracy.attempt(make, "cuda", torch.float16, "range")
    assert not verdict.passed
    assert verdict.fault.startswith("AssertionError: two lines xx")
    assert len(verdict.fault) < 500
    with pytest.raises(KeyboardInterrupt):
        accuracy.attempt(_interrupted, "cuda", torch.float16, "range")


def _interrupted(*_: object) -> accuracy.Verdict:
    raise KeyboardInterrupt


def _there() -> SimpleNamespace:
    place = {"device": torch.device("cuda:0"), "is_cuda": True}
    return SimpleNamespace(**place, dtype=torch.float16, shape=(1, 8, 64, 64))
