"""`verify` passes what is right, and fails an attention backend that is wrong in one respect."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from dense_attn import layout_attention
from dense_attn.__main__ import main
from dense_attn._backends import table
from dense_attn.verify import accuracy, reversible, sega
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

    calls = list(attention.calls())[:1]
    monkeypatch.setattr(attention, "calls", lambda: iter(calls))
    monkeypatch.setattr(attention, "DTYPES", (torch.float32,))
    monkeypatch.setattr(attention, "layout_attention", faulty)
    monkeypatch.setitem(table.NAMESPACES, "triton", SimpleNamespace())
    for family in (sega, reversible):
        monkeypatch.setattr(family, "verify", lambda: iter(()))
    monkeypatch.setattr(table, "ORDER", ("triton", "reference"))
    monkeypatch.setattr(table, "device_of", lambda backend: "cpu")
    monkeypatch.setattr(table, "why_not", lambda backend, op, x: [])


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
    verdicts = [verdict for verdict in attention.verify() if verdict.backend == "triton"]
    assert len(verdicts) == 4
    for verdict in verdicts:
        assert {name for name, ratio in verdict.numbers.items() if ratio > 1} >= results
    code, out = main(["verify"]), capsys.readouterr().out
    assert code == 1
    assert sum(line.startswith("triton") and "FAILED (" in line for line in out.splitlines()) == 4
    assert "rows FAILED" in out.splitlines()[-1]


def test_verify_names_a_backend_for_other_tensors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        table, "missing", lambda backend, op: None if backend == "triton" else "not here"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(table, "device_of", lambda backend: "cuda")
    for module in (attention, sega, reversible):
        monkeypatch.setattr(module, "verify", lambda: iter(()))
    assert main(["verify"]) == 0
    assert "triton: not checked, no GPU on this machine\n" in capsys.readouterr().out
