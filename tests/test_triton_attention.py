"""Layout attention's Triton kernels without a GPU, through the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_through_the_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    file = Path(__file__).with_name("interpreted_attention.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    tests = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert " passed" in tests.stdout
