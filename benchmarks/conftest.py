"""`pytest benchmarks/` takes the suite's own choices: --quick and --workload NAME."""

from __future__ import annotations

import pytest

from .suite import cases


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dense_attn")
    group.addoption("--quick", action="store_true", help="the suite of a minute")
    group.addoption("--workload", action="append", metavar="NAME", help="only this workload; may be repeated")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        rows = cases(metafunc.config.getoption("--quick"), metafunc.config.getoption("--workload"))
        metafunc.parametrize("case", list(rows), ids=str)
