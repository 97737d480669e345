"""The emulated CUDA library in processes of its own: it is to be loaded before dense_attn is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import build

TESTS = Path(__file__).resolve().parents[2]
COMPILED = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


def emulate(file: str, selection: str, *options: str, head_dims: str = "40") -> str:
    """The output of a run of a file below tests/, which must pass."""
    command = ["-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return _output([*command, "-p", "cuda.plugin", "-k", selection, *options, file], head_dims)


def run(program: str, head_dims: str = "40") -> str:
    """The output of a program, which must end well."""
    return _output(["-c", program], head_dims)


def _output(arguments: list[str], head_dims: str) -> str:
    given = {"PYTHONPATH": str(TESTS / "support"), "DENSE_ATTN_CUDA_HEAD_DIMS": head_dims}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS,
        env=os.environ | given,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout
