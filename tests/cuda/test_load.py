"""The reasons why the CUDA library is not loaded, and which ops a build lacks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dense_attn._backends import contract, cuda, table


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the backend takes for its package, without a library."""
    monkeypatch.setattr(cuda, "__file__", str(tmp_path / "_backends" / "cuda.py"))
    monkeypatch.setattr(cuda, "_said", lambda name: None)
    return tmp_path


def test_a_library_that_is_not_built(package: Path) -> None:
    advice = "DENSE_ATTN_CUDA=1 pip install --no-build-isolation . where nvcc is"
    assert cuda._load() == f"the CUDA library is not built: {advice}"


def test_a_library_that_does_not_load(package: Path) -> None:
    (package / "_CUDA.so").write_bytes(b"no library")
    assert cuda._load().startswith("the CUDA library does not load: ")
    assert "_CUDA.so" in cuda._load()


@pytest.mark.parametrize("digest", ["another", contract.DIGEST])
def test_a_library_that_is_there(digest: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_said", {"contract": digest}.get)
    assert cuda._load() == (None if digest == contract.DIGEST else cuda._OTHER_VERSION)


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for where a GPU is, and not at import."""
    answers = {"driver_error": "needs a driver for CUDA 13.0, got one for 12.4"}
    monkeypatch.setattr(cuda, "_said", answers.get)
    reason = "the CUDA library needs a driver for CUDA 13.0, got one for 12.4"
    monkeypatch.setattr(cuda, "_driver_errors", [])
    assert cuda.driver_error() == reason
    monkeypatch.setattr(cuda, "LOAD_ERROR", None)
    monkeypatch.setattr(cuda, "LACKING", set())
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    monkeypatch.setattr(table, "_no_gpu", lambda: None)
    assert table.unavailable("cuda", "ddim_step") == reason


def test_a_torch_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert cuda._load() == "the CUDA library runs on NVIDIA's GPUs, got a torch for AMD's"


def test_an_op_without_a_kernel_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LOAD_ERROR", None)
    monkeypatch.setattr(cuda, "LACKING", {"layout_attention_fwd", "exact_mix"})
    reason = "no cuda kernel of {} in this build"
    for op in ("layout_attention", "ReversibleSampler"):
        assert table.missing("cuda", op) == reason.format(op)
    assert table.missing("cuda", "ddim_step") is None
