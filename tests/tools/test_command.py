"""How commands end: at Ctrl-C, into a closed pipe, on a full disk, and with any letters."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import tree
from forked.interrupts import interruptible

from dense_attn import _command
from dense_attn._command import UserError

COMMAND = [sys.executable, "-m", "dense_attn"]
ASCII = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "OMP_NUM_THREADS": "1"}
PICTURES = ("demo", "--grids", "8", "--backend", "reference")


@pytest.mark.parametrize("below", ["_command", "_kernel_report", "verify"])
def test_the_demo_stands_above(below: str) -> None:
    """None of these imports the demo."""
    modules = tree.modules()
    paths = [path for name, path in modules.items() if tree.family_of(name) == below]
    imported = {name for path in paths for name in tree.imports(path, modules)}
    assert imported
    assert "demo" not in map(tree.family_of, imported)


def interrupted(arguments: list[str], ready: str, folder: Path) -> tuple[int, str, str]:
    """Exit code and output of a command that gets Ctrl-C at a line that begins with `ready`."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        text=True,
        preexec_fn=interruptible,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out = ""
    for line in process.stdout:
        out += line
        if line.startswith(ready):
            break
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=120)
    return process.returncode, out + rest, err


@pytest.mark.parametrize(
    ("arguments", "ready"),
    [
        pytest.param(["-m", "dense_attn", "verify"], "backend", id="verify"),
        pytest.param(["-m", "dense_attn", "demo", "--backend", "reference"], "Queries", id="demo"),
        pytest.param(
            ["-m", "dense_attn", "bench", "--family", "sega", "--json", "rows.json"],
            "sega-",
            id="bench",
            marks=pytest.mark.full,
        ),
        pytest.param(
            ["-m", "dense_attn.examples.layout_to_image", "--steps", "500"],
            "no --model",
            id="example",
        ),
    ],
)
def test_ctrl_c_ends_a_command_without_a_traceback(
    arguments: list[str], ready: str, tmp_path: Path
) -> None:
    for package in ("matplotlib", "tqdm", "pytest_benchmark", "diffusers"):
        pytest.importorskip(package)
    code, out, err = interrupted(arguments, ready, tmp_path)
    assert code == 130, err
    assert err.splitlines()[-1].endswith(": interrupted")
    assert "Traceback" not in out + err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"] * ("bench" in arguments)
    for path in tmp_path.iterdir():
        assert json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("arguments", [["info"], ["info", "--kernels"], ["--help"]], ids=" ".join)
def test_a_closed_pipe_is_quiet(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "wb") as file:
        done = subprocess.run(
            [*COMMAND, *arguments], stdout=file, stderr=subprocess.PIPE, check=False
        )
    assert done.stderr == b""
    assert done.returncode == (0 if arguments == ["--help"] else 141)


def test_output_that_cannot_be_written_is_one_sentence() -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "info"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (
        2,
        "dense_attn info: [Errno 28] No space left on device\n",
    )


@pytest.mark.parametrize(
    "locale",
    [
        pytest.param(ASCII, id="C"),
        pytest.param({"PYTHONIOENCODING": "ascii"}, id="ascii", marks=pytest.mark.full),
    ],
)
def test_letters_outside_of_ascii(locale: dict[str, str], tmp_path: Path) -> None:
    """In a file's name, in phrases, in what is printed and drawn."""
    for package in ("matplotlib", "tqdm", "PIL"):
        pytest.importorskip(package)
    from PIL import Image

    labels = Image.new("L", (16, 16))
    labels.paste(1, (2, 2, 9, 14))
    labels.save(tmp_path / "häuschen.png")
    arguments = ("--layout", "häuschen.png", "--phrases", "ein Kätzchen", "--output", "bücher.svg")
    done = subprocess.run(
        [*COMMAND, *PICTURES, *arguments],
        cwd=tmp_path,
        env=os.environ | locale,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"ein K\xe4tzchen" in done.stdout
    assert b"<svg" in (tmp_path / "bücher.svg").read_bytes()


def test_a_wrong_file_with_such_a_name_is_still_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("PIL")
    command = [*COMMAND, *PICTURES, "--layout", "fehlt-ä.png"]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | ASCII, capture_output=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.endswith(b".png does not exist\n")


@pytest.mark.parametrize("value", ["2", "maybe"])
def test_a_wrong_variable_is_refused_by_every_command(value: str) -> None:
    done = forked.run(forked.COMMAND, "info", DENSE_ATTN_AUTOTUNE=value)
    assert done.returncode == 2
    assert done.stderr == f"dense_attn info: DENSE_ATTN_AUTOTUNE must be 1 or 0, got '{value}'\n"


def ends(error: BaseException | None) -> int:
    def main() -> None:
        if error is not None:
            raise error

    return _command.run("a command", main)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (None, 0, ""),
        (KeyboardInterrupt(), 130, "a command: interrupted\n"),
        (UserError("x must be y"), 2, "a command: x must be y\n"),
        (FileNotFoundError(2, "No such file", "x"), 2, "a command: [Errno 2] No such file: 'x'\n"),
        (torch.OutOfMemoryError("no room"), 2, "a command: no room\n"),
        (BrokenPipeError(), 141, ""),
    ],
)
def test_exit_codes(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture
) -> None:
    assert ends(error) == code
    assert capsys.readouterr() == ("", said)


def test_a_fault_of_the_library_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        ends(ZeroDivisionError())


@pytest.mark.parametrize("text", ["a cat", "ein Kätzchen", "ein K\udcc3\udca4tzchen"])
def test_typed_words_are_utf_8(text: str) -> None:
    assert _command.said(text) in ("a cat", "ein Kätzchen")
