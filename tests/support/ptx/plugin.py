"""A pytest plugin, `-p ptx.plugin`: the Triton backend's compiled kernels on CPU tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ptx.compiled import compiled_backend

compiled_backend()


def pytest_addoption(parser: pytest.Parser) -> None:
    """How the kernels are compiled and run."""
    group = parser.getgroup("emulated kernels")
    group.addoption("--ptx-target", default="sm_90", choices=("sm_80", "sm_90"))
    orders = ("forward", "backward", "random", "each")
    group.addoption("--ptx-order", default="forward", choices=orders)
    group.addoption("--ptx-harsh", action="store_true", help="inexact units as far off as they may")


@pytest.fixture(autouse=True)
def emulated_launches(pytestconfig: pytest.Config) -> Iterator[None]:
    """Every launch of a test, emulated."""
    from ptx import emulated

    options = (pytestconfig.getoption(f"--ptx-{name}") for name in ("target", "order", "harsh"))
    with emulated(*options):
        yield
