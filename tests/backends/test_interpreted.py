"""The Triton kernels through Triton's interpreter, in processes of their own: it interprets all of
one or nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("triton")

PARTS = {
    "attention in two phases": ("test_backends.py", "-k", "test_accuracy and triton and phases"),
    "guidance and steps": ("triton_sega.py", "triton_steps.py"),
    "attention": ("test_backends.py", "triton_attention.py", "-k", "triton and not phases"),
    "public ops": ("triton_backend.py", "test_gpu.py", "test_out_of_memory.py"),
}


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, subprocess.Popen]]:
    """All parts at once, on the cores that there are."""
    here, command = (
        Path(__file__).parent,
        [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider"],
    )
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    started = {}
    for name, part in PARTS.items():
        files = [str(here / word) if word.endswith(".py") else word for word in part]
        started[name] = subprocess.Popen(
            [*command, *files],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("part", PARTS)
def test_interpreted(part: str, runs: dict[str, subprocess.Popen]) -> None:
    output = runs[part].communicate()[0]
    assert runs[part].returncode == 0, output[-4000:]
    assert " passed" in output
