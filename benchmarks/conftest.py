"""`pytest benchmarks/` takes the suite's own choices."""

from __future__ import annotations

import pytest

from .families import families
from .harness import dry_run, machine
from .harness.measure import Latest
from .layout_attention import shapes

_OWN = pytest.StashKey[list[str]]()  # the names of the user's own shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("dense_attn")
    group.addoption("--quick", action="store_true", help="the suite of a minute")
    group.addoption(
        "--workload", action="append", metavar="NAME", help="only this workload; may be repeated"
    )
    group.addoption(
        "--family", action="append", metavar="NAME", help="only this family; may be repeated"
    )
    group.addoption(
        "--shape",
        action="append",
        default=[],
        metavar="B,H,M,N,D[,dtype]",
        help="a shape of your own",
    )
    group.addoption("--modulation", metavar="NAME", help="of the shapes")
    group.addoption("--regions", metavar="N", help="stripes of the shapes' layout")
    group.addoption(
        "--device", choices=machine.SUITES, default="cpu", help="what is measured (%(default)s)"
    )
    group.addoption(
        "--dry-run", action="store_true", help="a GPU's rows on the smallest sizes, without a GPU"
    )


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    here = machine.use(option("--device"), option("--dry-run"))
    try:
        config.stash[_OWN] = shapes.register(
            option("--shape"), option("--modulation"), option("--regions")
        )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from None
    if here.dry_run:
        dry_run.shrink()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "entry" in metafunc.fixturenames:
        name, option = metafunc.function.__name__.removeprefix("test_"), metafunc.config.getoption
        here = name in families() and name in (option("--family") or families())
        names = [*(option("--workload") or ()), *metafunc.config.stash[_OWN]]
        rows = families()[name].entries(option("--quick"), names or None) if here else ()
        if machine.current().dry_run:
            rows = dry_run.chosen(rows)
        metafunc.parametrize("entry", list(rows), ids=str)


def pytest_runtest_teardown(item: pytest.Function, nextitem: pytest.Function | None) -> None:
    if nextitem is None or nextitem.function is not item.function:
        Latest.forget_all()  # the next family's memory must not be that of the last
