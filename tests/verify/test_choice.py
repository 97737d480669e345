"""The order of "auto" on GPUs that are not here: their facts are made up, the table is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dense_attn.__main__ import main
from dense_attn._backends import choice, table

GPU = "NVIDIA A100"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for verdicts of its own, and a GPU of a name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    monkeypatch.setattr(choice, "_found", {})
    return tmp_path


def there(dtype: torch.dtype = torch.float16, device: str = "cuda:0") -> SimpleNamespace:
    return SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 8, 64, 64))


def first(keys: int | None, dtype: torch.dtype = torch.float16, device: str = "cuda:0") -> str:
    return choice.order("layout_attention", there(dtype, device), keys)[0]


@pytest.mark.parametrize("device", ["cuda:0", "cpu"])
def test_where_nothing_is_verified_the_table_says(device: str) -> None:
    assert [first(keys, device=device) for keys in (77, 128, 129, None)] == [
        *("cuda", "cuda", "triton", "triton")
    ]
    assert first(77, torch.float32, device) == "triton"
    assert choice.order("ddim_step", there(device=device))[:2] == ("triton", "cuda")


@pytest.mark.parametrize("keys", [77, 4096])
@pytest.mark.parametrize(("verified", "other"), [("triton", "cuda"), ("cuda", "triton")])
def test_what_is_verified_comes_first(verified: str, other: str, keys: int) -> None:
    choice.remember(verified, GPU, True)
    assert choice.order("layout_attention", there(), keys)[:2] == (verified, other)


@pytest.mark.parametrize("keys", [77, 4096])
def test_where_both_are_verified_the_table_says(keys: int) -> None:
    choice.remember("triton", GPU, True)
    choice.remember("cuda", GPU, True)
    assert first(keys) == ("cuda" if keys == 77 else "triton")


def test_what_is_wrong_comes_last() -> None:
    choice.remember("cuda", GPU, False)
    assert choice.order("layout_attention", there(), 77) == ("triton", "cpu", "reference", "cuda")


def test_a_verdict_belongs_to_its_gpu_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    choice.remember("triton", "NVIDIA H100", True)
    assert first(77) == "cuda"
    assert choice.gpus("triton") == {"NVIDIA H100": True}
    choice.remember("triton", GPU, True)
    assert first(77) == "triton"
    monkeypatch.setattr(choice, "_kernels", lambda backend: "others")
    monkeypatch.setattr(choice, "_found", {})
    assert first(77) == "cuda"
    assert choice.gpus("triton") == {}


def test_a_call_on_the_cpu_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "verdict", lambda *_: 1 / 0)
    assert first(77, device="cpu") == "cuda"


def test_auto_takes_the_first_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "missing", lambda backend, op: None)
    monkeypatch.setattr(table, "why_not", lambda backend, op, x: ["no"] * (backend == "cuda"))
    assert table.resolve("auto", "layout_attention", there(), 77) == "triton"
    monkeypatch.setattr(table, "why_not", lambda backend, op, x: [])
    assert table.resolve("auto", "layout_attention", there(), 77) == "cuda"
    choice.remember("triton", GPU, True)
    monkeypatch.setattr(choice, "_found", {})
    assert table.resolve("auto", "layout_attention", there(), 77) == "triton"


def test_info_says_what_ran(capsys: pytest.CaptureFixture) -> None:
    main(["info"])
    assert capsys.readouterr().out.count("not run on a GPU\n") == 2
    choice.remember("triton", GPU, True)
    main(["info"])
    out = capsys.readouterr().out
    assert f"triton     right on {GPU}\n" in out
    assert "cuda       not run on a GPU\n" in out
    assert "counted, not measured" in out


def test_verify_remembers_the_backends_of_gpus(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from dense_attn.verify import run
    from dense_attn.verify.accuracy import Verdict

    def verdict(backend: str, error: float) -> Verdict:
        return Verdict(backend, "float16", "range", {"out": error}, control=2.0)

    def rows(*verdicts: Verdict) -> Callable[[object], list[Verdict]]:
        return lambda backends: list(verdicts)

    devices = {"triton": "cuda", "cuda": "cuda"}
    monkeypatch.setattr(table, "device_of", lambda backend: devices.get(backend, "cpu"))
    monkeypatch.setattr(run, "_attention", rows(verdict("triton", 0.5), verdict("cpu", 0.5)))
    monkeypatch.setattr(run, "_others", rows(verdict("triton", 0.5), verdict("cuda", 1.5)))
    monkeypatch.setattr(run, "why_not", lambda *_: [])
    assert run.main() == 1
    assert "remembered: cuda FAILED on NVIDIA A100\n" in capsys.readouterr().out
    assert choice.gpus("triton") == {GPU: True}
    assert choice.gpus("cuda") == {GPU: False}
    assert choice.gpus("cpu") == {}
