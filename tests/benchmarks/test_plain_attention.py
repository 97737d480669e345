"""The yardstick of the layout attention kernels, in a process that interprets it."""

from __future__ import annotations

from pathlib import Path

import forked
import pytest

pytest.importorskip("triton")


def test_plain_attention_is_attention() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "plain_attention.py")
    here = Path(__file__).parent
    done = forked.run(forked.PYTEST, *options, cwd=here, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
