"""Triton kernels of semantic guidance and of reversible steps without a GPU, through the interpreter.

Triton interprets every kernel of a process or none, so the interpreted tests run in a process of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def test_interpreted() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    file = Path(__file__).with_name("interpreted_steps.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
