"""`verify` passes what is right, and fails an attention backend that is wrong in one respect."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from torch import Tensor

from dense_attn import layout_attention
from dense_attn.__main__ import main
from dense_attn._backends import table
from dense_attn.verify import accuracy, calls, reversible, run, sega
from dense_attn.verify import layout_attention as attention

pytestmark = pytest.mark.usefixtures("one_thread")


def test_verify_passes_every_backend_here(capsys: pytest.CaptureFixture) -> None:
    code, out = main(["verify"]), capsys.readouterr().out
    available = [name for name in table.ORDER if table.missing(name, "layout_attention") is None]
    rows = [line.split() for line in out.splitlines() if line.startswith(tuple(available))]
    others = len(("thresholds", "guidance", "mixed", "steps", "edict", "bdia"))
    each = len(attention.MODULATIONS) + others
    assert len(rows) == len(available) * len(accuracy.DTYPES) * each
    assert code == 0, out
    assert "every row passed" in out


def _wrong_gradients(call: Callable, *tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return tuple(x.detach() + 0.999 * (x - x.detach()) for x in call(*tensors, **options))


def _wrong_scale(
    call: Callable, q: Tensor, *tensors: Tensor, **options: object
) -> tuple[Tensor, Tensor]:
    return call(1.0001 * q, *tensors, **options)


def _no_regions(
    call: Callable,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_regions: Tensor,
    *tensors: Tensor,
    **options: object,
) -> tuple[Tensor, Tensor]:
    return call(q, k, v, torch.full_like(q_regions, -1), *tensors, **options)


@pytest.fixture
def wrong_backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A "triton" backend that is the reference but for one fault, and one small call."""

    def faulty(*tensors: Tensor, backend: str, **options: object) -> tuple[Tensor, Tensor]:
        if backend != "triton":
            return layout_attention(*tensors, backend=backend, **options)
        return request.param(layout_attention, *tensors, backend="reference", **options)

    first = list(calls.calls())[:1]
    monkeypatch.setattr(calls, "calls", lambda: iter(first))
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(calls, "layout_attention", faulty)
    monkeypatch.setitem(table.NAMESPACES, "triton", SimpleNamespace())
    for family in (sega, reversible):
        monkeypatch.setattr(family, "verify", lambda backends: iter(()))
    monkeypatch.setattr(table, "ORDER", ("triton", "reference"))
    monkeypatch.setattr(table, "device_of", lambda backend: "cpu")
    monkeypatch.setattr(table, "why_not", lambda backend, op, x, *_: [])


@pytest.mark.parametrize(
    ("wrong_backend", "results"),
    [
        (_wrong_gradients, {"dq", "dk", "dv"}),
        (_wrong_scale, {"out", "lse", "dq", "dk", "dv"}),
        (_no_regions, {"out", "lse", "dq", "dk", "dv"}),
    ],
    indirect=["wrong_backend"],
)
@pytest.mark.usefixtures("wrong_backend")
def test_verify_fails_a_wrong_backend(results: set[str], capsys: pytest.CaptureFixture) -> None:
    verdicts = [
        verdict
        for verdict in attention.verify(table.ORDER, [*calls.calls()])
        if verdict.backend == "triton"
    ]
    assert len(verdicts) == 4
    for verdict in verdicts:
        assert {name for name, ratio in verdict.numbers.items() if ratio > 1} >= results
    code, out = main(["verify"]), capsys.readouterr().out
    assert code == 1
    assert sum(line.startswith("triton") and "FAILED (" in line for line in out.splitlines()) == 4
    assert "rows FAILED" in out.splitlines()[-1]


def test_calls_that_a_backend_refuses_are_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """And what it takes is checked: a head dim is no reason to know nothing."""

    def why_not(backend: str, op: str, x: Tensor, *_: int) -> list[str]:
        return ["too odd"] if backend == "cpu" and x.shape[-1] == 7 else []

    def strict(q: Tensor, *rest: Tensor, backend: str, **options: object) -> tuple[Tensor, Tensor]:
        assert not why_not(backend, "layout_attention", q)
        run_on.append((backend, q.shape[-1]))
        return layout_attention(q, *rest, backend="reference", **options)

    run_on: list[tuple[str, int]] = []
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(attention, "MODULATIONS", ("max",))
    monkeypatch.setattr(calls, "layout_attention", strict)
    monkeypatch.setattr(table, "unavailable", lambda backend, op: None)
    monkeypatch.setattr(table, "why_not", why_not)
    for family in (sega, reversible):
        monkeypatch.setattr(family, "verify", lambda backends: iter(()))
    assert run.main(["cpu"]) == 0
    out = capsys.readouterr().out
    assert "cpu: odd sizes of layout_attention not checked, too odd\n" in out
    assert {head_dim for backend, head_dim in run_on if backend == "cpu"} == {40, 80, 160, 16}


def test_verify_names_a_backend_for_other_tensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        table, "missing", lambda backend, op: None if backend == "triton" else "not here"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(table, "device_of", lambda backend: "cuda")
    for module in (attention, sega, reversible):
        monkeypatch.setattr(module, "verify", lambda *_: iter(()))
    assert main(["verify"]) == 0
    assert "triton: not checked, no GPU on this machine" in capsys.readouterr().out


def test_emulated_needs_a_checkout(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "EMULATOR", tmp_path / "nowhere")
    assert main(["verify", "--emulated"]) == 2
    sentence = capsys.readouterr().err
    assert "--emulated must run in a checkout" in sentence
    assert "the compiled Triton kernels are not checked" in sentence


def test_without_a_gpu_verify_says_what_it_did_not_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for module in (attention, sega, reversible):
        monkeypatch.setattr(module, "verify", lambda *_: iter(()))
    monkeypatch.setattr(table, "missing", lambda *_: "no GPU")
    monkeypatch.setattr(table, "unavailable", lambda *_: "no GPU")
    assert main(["verify"]) == 0
    assert "triton: not checked, no GPU; --emulated checks" in capsys.readouterr().out
    monkeypatch.setattr(run, "EMULATOR", tmp_path / "nowhere")
    assert main(["verify"]) == 0
    assert "triton: not checked, no GPU\n" in capsys.readouterr().out


@pytest.mark.full
def test_emulated_kernels_pass_and_wrong_ones_do_not() -> None:
    """One dtype and modulation of each family, in a process whose backend is emulated."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from ptx.compiled import compiled_backend; compiled_backend()\n"
        "import torch; from ptx import __main__; from ptx.module import Module\n"
        "from dense_attn.verify import calls, layout_attention, sega, reversible\n"
        "first = list(calls.calls())[:1]\n"
        "calls.calls = lambda: iter(first)\n"
        "layout_attention.MODULATIONS = ('range',)\n"
        "for family in (layout_attention, sega, reversible): family.DTYPES = (torch.float16,)\n"
        "launch = Module.launch\n"
        "def wrong(self, kernel, arguments, *others, **how):\n"
        "    launch(self, kernel, arguments, *others, **how)\n"
        "    if 'row_fwd' in kernel:\n"
        "        next(x for x in arguments if isinstance(x, torch.Tensor)).mul_(2)\n"
        "if len(sys.argv) > 2: Module.launch = wrong\n"
        "sys.exit(__main__.main('sm_80'))\n"
    )
    for arguments, code, words in (((), 0, "every row passed"), (("wrong",), 1, "rows FAILED")):
        done = forked.run(program, str(run.EMULATOR.parent), *arguments)
        assert done.returncode == code, done.stdout + done.stderr
        assert words in done.stdout
        assert done.stdout.count("triton     float16") == 7
