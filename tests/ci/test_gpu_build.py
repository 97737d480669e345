"""The parts of the library that `make gpu` builds, and what is said where a compiler is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu
import gpu_build
import gpu_plan
import pytest
import tree

ROOT = Path(__file__).resolve().parents[2]


def test_the_python_part_is_that_of_an_installation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_build, "LIBRARY", tmp_path / "lib")
    assert gpu_build.build_python() == 0
    for name, path in tree.modules().items():
        parts = name.split(".")
        place = tmp_path / "lib" / Path(*parts)
        built = place / "__init__.py" if path.name == "__init__.py" else place.with_suffix(".py")
        assert built.read_bytes() == path.read_bytes()
    setup = (ROOT / "setup.py").read_text()
    assert f"BESIDE = {json.dumps(gpu_build.BESIDE)}".replace("[", "(").replace("]", ")") in setup
    assert f"OLDEST_SETUPTOOLS = {gpu_build.OLDEST_SETUPTOOLS} " in setup


def test_old_setuptools_cost_the_cpu_kernels_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(gpu_build.metadata, "version", lambda name: "65.5.1")
    assert gpu_build.build_cpu() == gpu_build.SKIPPED
    reason = "setuptools 65.5.1, and 77 is needed: the library runs without its CPU kernels\n"
    assert capsys.readouterr().out == reason


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """The environment that setup.py, which is not run, is asked to build in; its exit code."""
    monkeypatch.setattr(gpu_build, "BUILD", tmp_path)
    monkeypatch.setattr(gpu_build, "LIBRARY", tmp_path / "lib")
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(gpu_build.metadata, "version", lambda name: "80.1")
    for folder in ("lib", "native"):
        (tmp_path / folder / "dense_attn").mkdir(parents=True)
    asked: dict[str, object] = {"code": 0, "arch": "90\n", "release": "release 13.0"}

    def run(command: list[str], **how: object) -> subprocess.CompletedProcess:
        if "setup.py" not in command:  # nvcc's version, or the GPU's
            text = asked["arch" if command[0] == sys.executable else "release"]
            return subprocess.CompletedProcess(command, int(not text), text)
        assert command[1:4] == ["setup.py", "--quiet", "build_ext"]
        assert command[-2:] == ["--build-lib", str(tmp_path / "native")]
        asked.update({x: how["env"].get(f"DENSE_ATTN_{x}") for x in ("CUDA", "CPU_KERNELS")})
        asked["archs"] = how["env"].get("DENSE_ATTN_CUDA_ARCHS")
        library = gpu_build.CUDA if asked["CUDA"] == "1" else gpu_build.CPU
        (tmp_path / "native" / library).write_text("kernels")
        return subprocess.CompletedProcess(command, asked["code"])

    monkeypatch.setattr(gpu_build.subprocess, "run", run)
    return asked


@pytest.mark.parametrize("code", [0, 1])
@pytest.mark.parametrize("kernels", ["CPU", "CUDA"])
def test_kernels_come_whole_into_their_place(kernels: str, code: int, compiled: dict) -> None:
    """Each library by itself: nobody waits for the other's compiler."""
    compiled["code"] = code
    assert getattr(gpu_build, f"build_{kernels.lower()}")() == code
    assert (gpu_build.LIBRARY / getattr(gpu_build, kernels)).exists() == (code == 0)
    switches = {"CPU": ("0", "1"), "CUDA": ("1", "0")}
    assert (compiled["CUDA"], compiled["CPU_KERNELS"]) == switches[kernels]
    assert kernels == "CPU" or compiled["archs"] == "90"


def test_cuda_kernels_need_nvcc(compiled: dict, capsys: pytest.CaptureFixture) -> None:
    compiled["release"] = "release 12.6"
    assert gpu_build.build_cuda() == gpu_build.SKIPPED
    said = capsys.readouterr().out
    assert said.startswith("the CUDA kernels must have nvcc 12.8 or newer, got 12.6: ")
    assert said.count("\n") == 1
    assert "archs" not in compiled


def test_cuda_kernels_need_a_compiler_and_a_gpu(
    compiled: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    compiled["arch"] = ""
    assert gpu_build.build_cuda() == 1
    monkeypatch.setattr(
        gpu_build.shutil, "which", lambda name, path=None: name if name == "nvcc" else None
    )
    assert gpu_build.build_cuda() == gpu_build.SKIPPED
    reason = "no C++ compiler: the library runs without its CUDA kernels\n"
    assert capsys.readouterr().out == reason
    assert "archs" not in compiled


def test_a_dry_run_compiles_no_cuda_kernels(
    compiled: dict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    dry, real = (
        next(step for step in gpu_plan.steps(gpu._parse(argv), Path("x")) if "cuda-" in step.name)
        for argv in (["--dry-run"], [])
    )
    assert (dry.command[2:], real.command[2:]) == (["cuda", "--dry-run"], ["cuda"])
    assert (dry.note, real.note) == ("nothing compiled", "")
    monkeypatch.setattr(sys, "argv", dry.command[1:])
    assert gpu_build.build_cuda() == 0
    assert capsys.readouterr().out == "nvcc\n"
    assert "archs" not in compiled
