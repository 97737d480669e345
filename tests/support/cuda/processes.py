"""The emulated CUDA library in processes of its own: it is to be loaded before dense_attn is."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest

from . import build

TESTS = Path(__file__).resolve().parents[2]
COMPILED = pytest.mark.skipif(build.missing() is not None, reason=str(build.missing()))


def emulate(file: str, selection: str, *options: str, head_dims: str = "40") -> str:
    """The output of a run of a file below tests/, which must pass."""
    command = ("-q", "-rP", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "cuda.plugin")
    return _output(head_dims, forked.PYTEST, *command, "-k", selection, *options, file)


def run(program: str, head_dims: str = "40") -> str:
    """The output of a program, which must end well."""
    return _output(head_dims, program)


def _output(head_dims: str, program: str, *arguments: str) -> str:
    given = {"PYTHONPATH": str(TESTS / "support"), "DENSE_ATTN_CUDA_HEAD_DIMS": head_dims}
    done = forked.run(program, *arguments, cwd=TESTS, **given)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-4000:]
    return done.stdout
