"""Fixtures of every test: seeded random numbers and memory that shows when a kernel leaves some of
it unwritten.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

os.environ.setdefault(
    "OMP_WAIT_POLICY", "PASSIVE"
)  # small calls on shared cores: threads that spin cost 3x the time

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # without it deterministic mode refuses products on a GPU

os.environ.pop(
    "PYTEST_XDIST_WORKER", None
)  # beside it no benchmark that a test starts would be timed

import pytest
import torch
from cases import INTERPRETED


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
    """As fast as the interpreter goes."""
    import interpreter

    interpreter.install(monkeypatch)


@pytest.fixture(scope="module")
def pipe() -> object:
    """The small trained model."""
    from dense_attn.examples.tiny_scenes import model

    return model.load_pipeline()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Tensor, ...]]:
    """q, k, v, words of queries and keys, and strength of all calls of layout_attention inside of
    pipelines.
    """
    from dense_attn.integrations.diffusers import state

    seen: list[tuple[torch.Tensor, ...]] = []
    original: Callable = state.layout_attention

    def watched(*args: torch.Tensor, **options: object) -> torch.Tensor:
        seen.append(args)
        return original(*args, **options)

    monkeypatch.setattr(state, "layout_attention", watched)
    return seen


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill every new tensor with NaN, those made in C++ too: deterministic mode does that."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
