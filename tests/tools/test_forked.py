"""Programs that are forked beside `python -c`, which they stand for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest

PROGRAMS = {
    "arguments": "import sys; print(__name__, sys.argv)",
    "folders": "import os, sys; print(os.getcwd(), sys.path)",
    "environment": "import os; print(sorted(os.environ.items()))",
    "nothing to read": "import sys; print(repr(sys.stdin.read()))",
    "an exit code": "import sys; print('said', file=sys.stderr); sys.exit(3)",
    "a sentence": "raise SystemExit('a sentence')",
    "a signal": "import os; os.kill(os.getpid(), 9)",
    "an end at once": "import os; os._exit(5)",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_a_program_sees_and_leaves(program: str, tmp_path: Path) -> None:
    program, asked = PROGRAMS[program], {"PYTHONPATH": "/a:/b", "SAID": "yes"}
    found = forked.run(program, "x", "y", cwd=tmp_path, **asked)
    expected = subprocess.run(
        [sys.executable, "-c", program, "x", "y"],
        cwd=tmp_path,
        env=os.environ | asked,
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    for one in ("returncode", "stdout", "stderr"):
        assert getattr(found, one) == getattr(expected, one), one


def test_an_error_has_its_traceback() -> None:
    found = forked.run("def f(): 1 / 0\nf()")
    assert found.returncode == 1
    assert found.stderr.endswith("in f\nZeroDivisionError: division by zero\n")


def test_torch_is_there_and_nothing_of_ours() -> None:
    names = ("torch", "triton", "dense_attn")
    program = f"import sys; print(*(name in sys.modules for name in {names}))"
    assert forked.run(program).stdout == "True False False\n"
