"""The options of the suite, which `pytest benchmarks/` takes too."""

from __future__ import annotations

import pytest

from .families import families, place
from .harness import dry_run, machine
from .harness.measure import Latest
from .layout_attention import shapes

_OWN = pytest.StashKey[list[str]]()  # the names of the user's own shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("dense_attn").addoption
    several = {"action": "append", "metavar": "NAME"}
    add("--quick", action="store_true", help="the suite of a minute")
    add("--workload", **several, help="only this workload; may be repeated")
    add("--family", **several, help="only this family; may be repeated")
    add("--contender", **several, help="only rows of this contender; may be repeated")
    shape = {"action": "append", "default": [], "metavar": "B,H,M,N,D[,dtype]"}
    add("--shape", **shape, help="a shape of your own")
    add("--modulation", metavar="NAME", help="of the shapes")
    add("--regions", metavar="N", help="stripes of the shapes' layout")
    add("--device", choices=machine.SUITES, default="cpu", help="what is measured (%(default)s)")
    add("--dry-run", action="store_true", help="a GPU's rows on the smallest sizes, without a GPU")


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    here = machine.use(option("--device"), option("--dry-run"))
    try:
        own = (option(name) for name in ("--shape", "--modulation", "--regions"))
        config.stash[_OWN] = shapes.register(*own)
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
        contenders = option("--contender")
        rows = (x for x in rows if not contenders or x.contender in contenders)
        if machine.current().dry_run:
            rows = dry_run.chosen(rows)
        metafunc.parametrize("entry", list(rows), ids=str)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """A GPU's rows come in the order of their evidence; elsewhere a family's stay together."""
    if machine.on_gpu():
        items.sort(key=_place)


def _place(item: pytest.Function) -> int:
    callspec = getattr(item, "callspec", None)
    contender = getattr(callspec and callspec.params.get("entry"), "contender", None)
    name = item.originalname.removeprefix("test_")
    return -1 if contender is None else place(name, contender)


def pytest_runtest_teardown(item: pytest.Function, nextitem: pytest.Function | None) -> None:
    if nextitem is None or nextitem.function is not item.function:
        Latest.forget_all()  # the next family's memory must not be that of the last
