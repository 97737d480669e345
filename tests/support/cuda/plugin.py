"""A pytest plugin, `-p cuda.plugin`: the CUDA backend's kernels on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ptx.module import ORDERS

from cuda.compiled import compiled_backend

RUNTIME = compiled_backend()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How the kernels are compiled and run."""
    group = parser.getgroup("emulated CUDA kernels")
    group.addoption("--cuda-order", default="forward", choices=(*ORDERS, "each"))
    group.addoption("--cuda-harsh", action="store_true", help="inexact units as far off as may be")


@pytest.fixture(autouse=True)
def raw_calls_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests of raw calls take the emulated ops in the place of the CPU's."""
    import raw

    monkeypatch.setattr(raw, "library", "dense_attn_cuda")


@pytest.fixture(autouse=True)
def emulated_cuda_launches(pytestconfig: pytest.Config) -> Iterator[None]:
    """Every launch of a test, emulated."""
    from cuda.launch import emulated

    options = (pytestconfig.getoption(f"--cuda-{name}") for name in ("order", "harsh"))
    with emulated(RUNTIME, *options):
        yield
