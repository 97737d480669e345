"""Fixtures of every test, and which cells of large matrices `make test` takes."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Small calls on shared cores: threads that spin cost three times as much.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Deterministic mode refuses products on a GPU without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Benchmarks that a test starts would not be timed beside it.
os.environ.pop("PYTEST_XDIST_WORKER", None)

import pytest
import selection
import torch
from cases import INTERPRETED

from dense_attn._backends import plans

MODULES = pytest.StashKey[set[Path]]()
ITEMS = pytest.StashKey[list[pytest.Item]]()


def pytest_configure() -> None:
    """Collect no garbage while tests are collected: all of it stays."""
    gc.disable()


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> None:
    """Note every file that is collected."""
    parent.config.stash.setdefault(MODULES, set()).add(module_path)


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cells of large matrices, and note every test, selected or not."""
    selection.mark(items)
    config.stash[ITEMS] = list(items)


def pytest_collection_finish() -> None:
    """Leave all tests and modules out of every collection of garbage: each took half a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let what was left out go when the process ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def no_plans() -> None:
    """Tests exchange what plans go by, like the tables of configurations."""
    plans.forget()


@pytest.fixture
def collected(pytestconfig: pytest.Config) -> tuple[set[Path], list[pytest.Item]]:
    """The files and tests of a run of the whole suite, whatever is selected of them."""
    if pytestconfig.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        pytest.skip("looks at a run of the whole suite")
    return pytestconfig.stash[MODULES], pytestconfig.stash[ITEMS]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small calls on one thread: handing them out would cost more than they do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=INTERPRETED)
def interpreted(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter, as fast as it goes."""
    import interpreter

    interpreter.install(monkeypatch)


@pytest.fixture(scope="module")
def pipe() -> object:
    """The small trained model."""
    from dense_attn.examples.tiny_scenes import model

    return model.load_pipeline()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """The positional arguments of every call of layout_attention inside of pipelines; of
    strengths, which all heads share, those of one.
    """
    from dense_attn.integrations.diffusers import layers

    seen: list[tuple[torch.Tensor, ...]] = []
    original: Callable = layers.layout_attention

    def watched(*args: torch.Tensor, **options: object) -> torch.Tensor:
        *others, strength = args
        seen.append((*others, strength[:, :1]))
        return original(*args, **options)

    monkeypatch.setattr(layers, "layout_attention", watched)
    return seen


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN, those made in C++ too: deterministic mode does that."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
