"""The reasons why the CUDA library is not loaded, and which ops a build lacks."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"contract": "another"}, cuda._OTHER_VERSION),
        (
            {"contract": contract.DIGEST, "driver_error": "needs a driver for CUDA 13.0, got 12.4"},
            "the CUDA library needs a driver for CUDA 13.0, got 12.4",
        ),
        ({"contract": contract.DIGEST, "driver_error": ""}, None),
    ],
)
def test_a_library_that_is_there(
    answers: dict[str, str], reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_said", answers.get)
    assert cuda._load() == reason


def test_an_op_without_a_kernel_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LOAD_ERROR", None)
    monkeypatch.setattr(cuda, "LACKING", {"layout_attention_fwd", "exact_mix"})
    reason = "no cuda kernel of {} in this build"
    for op in ("layout_attention", "ReversibleSampler"):
        assert table.missing("cuda", op) == reason.format(op)
    assert table.missing("cuda", "ddim_step") is None
