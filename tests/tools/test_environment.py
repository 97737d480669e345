"""Environment variables: one vocabulary, and a refusal in the variable's name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

from dense_attn import _environment

ROOT = Path(__file__).resolve().parents[2]
VALUES = {
    "1": True,
    "true": True,
    "YES": True,
    "on": True,
    "0": False,
    "false": False,
    "No": False,
    "off": False,
}


@pytest.mark.parametrize("value", VALUES)
def test_a_flag_is_on_or_off(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE", value)
    assert _environment.flag("DENSE_ATTN_AUTOTUNE") is VALUES[value]
    _environment.check()


def test_what_is_not_set_or_empty_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, ""):
        monkeypatch.setenv("A_FLAG", value) if value is not None else monkeypatch.delenv(
            "A_FLAG", raising=False
        )
        assert _environment.flag("A_FLAG") is False
        assert _environment.text("A_FLAG") is None


@pytest.mark.parametrize("value", ["2", " 1", "maybe", "ja"])
def test_a_value_that_means_nothing_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE", value)
    for ask in (_environment.check, lambda: _environment.flag("DENSE_ATTN_AUTOTUNE")):
        with pytest.raises(_environment.VariableError) as refused:
            ask()
        assert str(refused.value) == f"DENSE_ATTN_AUTOTUNE must be 1 or 0, got {value!r}"


def test_triton_reads_its_own_flag_as_this_library_does() -> None:
    pytest.importorskip("triton")
    program = "from triton.knobs import runtime; print(runtime.interpret)"
    for value in ("1", "TRUE", "yes", "on", "y", "0", "off", "n", "no", "false", ""):
        done = forked.run(program, TRITON_INTERPRET=value)
        assert done.stdout.strip() == str(value.lower() in _environment.ON), value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("0", "TRITON_INTERPRET=1 is not set"),
        ("2", "TRITON_INTERPRET must be 1 or 0, got '2'"),
        ("yes", "available"),
    ],
)
def test_the_table_of_backends_reads_it_so(value: str, reason: str) -> None:
    """Where torch knows no GPU."""
    pytest.importorskip("triton")
    program = """
import torch
torch.version.cuda = torch.version.hip = None
from dense_attn import backends
print(backends()["triton"]["layout_attention"])
"""
    assert reason in forked.run(program, TRITON_INTERPRET=value).stdout


def test_nothing_else_reads_the_environment() -> None:
    """But for what a child process is handed."""
    for folder in ("dense_attn", "triton_kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            assert path.name == "_environment.py" or "environ" not in path.read_text().replace(
                "_environment", ""
            ), path
    assert 'environ.get("DENSE' not in (ROOT / "setup.py").read_text()


def test_the_build_refuses_a_wrong_value() -> None:
    environment = os.environ | {"DENSE_ATTN_SANITIZE": "2"}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("DENSE_ATTN_SANITIZE must be 1 or 0, got '2'")
