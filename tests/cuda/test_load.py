"""The reasons why the CUDA library is not loaded, and which ops a build lacks."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cuda import build

from dense_attn._backends import contract, cuda, table

ROOT = Path(__file__).resolve().parents[2]


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
    ("digest", "sources", "reason"),
    [
        (contract.DIGEST, "0123456789abcdef", None),
        ("another", "0123456789abcdef", "with other arguments of its ops"),
        (contract.DIGEST, None, "which must name its sources, got ''"),
        (contract.DIGEST, "0123", "which must name its sources, got '0123'"),
    ],
)
def test_a_library_that_is_there(
    digest: str, sources: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "_said", {"contract": digest, "sources": sources}.get)
    expected = reason and f"the CUDA library is of another version, {reason}: install it again"
    assert cuda._load() == expected


@pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))
def test_a_library_names_what_it_is_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE_ATTN_CUDA_HEAD_DIMS", "40")
    program = "from cuda.compiled import compiled_backend; compiled_backend()\n"
    program += "from dense_attn._backends import cuda; print(cuda.sources())"
    folder = str(Path(build.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": folder},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [build.PLAN["digest"](build.PLAN["nvcc"](), build.PTX)]


def test_the_digest_is_of_every_source_and_of_how_it_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: dict[Path, bytes] = {}
    for name in (*build.PLAN["bindings"](), *(source for source, *_ in build.PLAN["jobs"]())):
        build._texts(ROOT / name, texts)
    plan = ROOT / "bindings" / "cuda" / "build.py"
    for path in (*texts, plan, ROOT / "csrc" / "cpu" / "sega.cpp"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    digest = runpy.run_path(str(tmp_path / plan.relative_to(ROOT)))["digest"]
    whole = digest("true", ["sm_80"])  # a compiler that says nothing
    assert re.fullmatch(r"[0-9a-f]{16}", whole)
    assert digest("true", ["sm_80"]) == whole
    assert digest("true", ["sm_90"]) != whole
    assert digest("uname", ["sm_80"]) != whole
    monkeypatch.setenv("DENSE_ATTN_CUDA_HEAD_DIMS", "40")
    assert digest("true", ["sm_80"]) != whole
    monkeypatch.delenv("DENSE_ATTN_CUDA_HEAD_DIMS")
    for path in (*texts, plan):
        copy = tmp_path / path.relative_to(ROOT)
        copy.write_bytes(path.read_bytes() + b"\n")
        assert digest("true", ["sm_80"]) != whole, path
        copy.write_bytes(path.read_bytes())
    (tmp_path / "csrc" / "cpu" / "sega.cpp").write_text("")
    assert digest("true", ["sm_80"]) == whole  # which is another library's


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
