"""`make wheel`: its tag is what the library's symbols allow, and what fails says so."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import wheels

import dense_attn
from dense_attn._backends import cpu

LIBRARY = Path(cpu.__file__).parents[1] / "_C.so"
NEWEST = {  # of what manylinux_2_28 has
    "GLIBC": (2, 28),
    "GLIBCXX": (3, 4, 25),
    "CXXABI": (1, 3, 11),
    "GCC": (8, 0, 0),
}


@pytest.mark.skipif(cpu.LOAD_ERROR is not None, reason="no compiled library")
def test_the_library_asks_for_nothing_newer_than_its_tag() -> None:
    """The names of the versions stand in its table of strings."""
    found = re.findall(rb"\0(GLIBC|GLIBCXX|CXXABI|GCC)_([\d.]+)(?=\0)", LIBRARY.read_bytes())
    asked = {(kind.decode(), tuple(map(int, version.split(b".")))) for kind, version in found}
    assert {kind for kind, _ in asked} >= {"GLIBC", "GLIBCXX"}
    assert {(kind, version) for kind, version in asked if version > NEWEST[kind]} == set()


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str]]]:
    """The commands that are run, in whose place a build leaves its two files."""
    monkeypatch.setattr(wheels, "ROOT", tmp_path)
    monkeypatch.setattr(wheels, "WORK", tmp_path / "work")
    monkeypatch.setattr(wheels, "DIST", tmp_path / "dist")
    (tmp_path / "dist").mkdir()
    done = []

    def run(program: str, *arguments: str, environment: dict[str, str]) -> None:
        done.append((" ".join(arguments), environment))
        if "build" in arguments:
            (wheels.WORK / "a.tar.gz").touch()
            with zipfile.ZipFile(wheels.WORK / "a.whl", "w") as file:
                file.writestr(f"dense_attn/{'_CUDA' if hasattr(wheels, 'CUDA') else '_C'}.so", "")

    monkeypatch.setattr(wheels, "run", run)
    return done


def test_a_wheel_of_the_cpu_has_torch_s_tag(ran: list) -> None:
    assert wheels.main([]) == 0
    (build, how), (repair, _) = ran
    assert "-m build --no-isolation" in build
    assert how == {"DENSE_ATTN_CPU_KERNELS": "1"}
    assert repair.endswith(f"--plat manylinux_2_28_{wheels.platform.machine()} --only-plat")
    assert "--exclude libtorch_cpu.so" in repair
    assert (wheels.DIST / "a.tar.gz").is_file()


def test_a_wheel_of_another_processor_is_linked_with_its_compiler(ran: list) -> None:
    assert wheels.main(["--cross", "aarch64"]) == 0
    (stub, _), (_, how), (repair, _) = ran
    folder = wheels.WORK / "aarch64"
    assert stub.endswith(f"-o {folder / 'libtorch_cpu.so'}")
    assert how["CXX"] == f"aarch64-linux-gnu-g++ -L{folder} -Wl,--no-as-needed"
    assert how["_PYTHON_HOST_PLATFORM"] == "linux-aarch64"
    assert repair.endswith("--plat auto")


def test_a_wheel_with_the_cuda_library_has_the_tag_that_is_found(
    ran: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wheels, "CUDA", True, raising=False)
    assert wheels.main([]) == 0
    assert ran[-1][0].endswith("--plat auto")


@pytest.mark.parametrize(
    ("program", "said"),
    [
        (sys.executable, "-c raise SystemExit('newer symbols') failed, as it says above"),
        ("/no/compiler", "/no/compiler must be there, got No such file or directory"),
    ],
)
def test_what_fails_is_shown(
    program: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run, command = wheels.run, ("-c", "raise SystemExit('newer symbols')")
    monkeypatch.setattr(wheels, "built", lambda env: run(program, *command, environment=env))
    assert wheels.main([]) == 1
    shown = capsys.readouterr().err
    assert shown.endswith(f"{said}\n")
    assert shown.startswith(("newer symbols\n", "make wheel: "))


def setup(*words: str) -> str:
    """The output of a program with setup.py's distribution at hand."""
    done = subprocess.run(words, cwd=wheels.ROOT, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_without_a_compiler_the_wheel_is_of_python_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("DENSE_ATTN_CUDA", "0")
    monkeypatch.delenv("CXX", raising=False)
    egg = ("egg_info", "--egg-base", str(tmp_path))
    build = ("build", "--build-base", str(tmp_path / "build"))
    wheel = ("bdist_wheel", "--dist-dir", str(tmp_path), "--bdist-dir", str(tmp_path / "bdist"))
    said = setup(sys.executable, "setup.py", "--quiet", *egg, *build, *wheel)
    (path,) = tmp_path.glob("*.whl")
    assert path.name == f"dense_attn-{dense_attn.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(path) as file:
        assert [name for name in file.namelist() if name.endswith(".so")] == []
    warning = "warning: dense_attn is built without its CPU kernels, as there is no C++ compiler: "
    assert warning in said


def test_a_wheel_with_a_library_is_for_every_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE_ATTN_CPU_KERNELS", "1")
    program = "import setuptools; from distutils.core import run_setup as run"
    program += "; wheel = run('setup.py', [], 'commandline').get_command_obj('bdist_wheel')"
    program += "; wheel.ensure_finalized(); print(*wheel.get_tag())"
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert setup(sys.executable, "-c", program).endswith(f"py3 none {platform}\n")
