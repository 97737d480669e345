"""The Triton backend in the table: its reasons, its device guard, captures that it sees, and what
leaves the grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from chains import Network, sampler
from torch import Tensor

from dense_attn import backends, layout_attention, reference
from dense_attn._backends import table, triton

OFF_GRID = 2**62
RULE = r"eps_fn's result must be finite and keep the latents within the grid of 2\^50 steps, got "


@pytest.mark.skipif(triton.LOAD_ERROR is None, reason="Triton's kernels are here")
def test_the_table_says_why_there_are_no_kernels() -> None:
    assert set(backends()["triton"].values()) == {triton.LOAD_ERROR}
    x, words = torch.zeros(1, 1, 2, 8), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"'triton': {triton.LOAD_ERROR}"):
        layout_attention(x, x, x, words, words, backend="triton")


def test_tensors_of_another_device_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.NAMESPACES, "triton", SimpleNamespace(LOAD_ERROR=None))
    monkeypatch.setattr(triton, "DEVICE", "cuda")
    assert table.why_not("triton", "ddim_step", torch.zeros(2)) == ["runs on cuda tensors, got cpu"]
    assert table.resolve("auto", "ddim_step", torch.zeros(2)) != "triton"


def test_a_launch_goes_to_the_device_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []

    @contextmanager
    def device(name: str) -> None:
        events.append(name)
        yield
        events.append("back")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    launch = triton._kernel(lambda x, *, y: None, lambda x, *, y: events.append(y))
    first, second = (
        SimpleNamespace(is_cuda=True, device=torch.device("cuda", index)) for index in (0, 1)
    )
    launch(second, y="launched")
    assert events == [second.device, "launched", "back"]
    launch(first, y="launched where it is")
    launch(torch.zeros(2), y="on the CPU")
    assert events[3:] == ["launched where it is", "on the CPU"]


def poisons(after: int) -> SimpleNamespace:
    """The reference's ops, but that after so many calls results leave the grid as on a GPU: a mark
    and a NaN.
    """
    calls = []

    def poisoned(name: str) -> Callable:
        def op(*arguments: object) -> tuple[Tensor, ...]:
            calls.append(name)
            on_grid = [
                _on_grid(x) if isinstance(x, Tensor) else x for x in arguments
            ]  # the reference takes no other
            *grids, latent = getattr(reference, name)(*on_grid)
            if len(calls) > after:
                for z in grids:
                    z.view(-1)[0] = OFF_GRID
                latent.view(-1)[0] = torch.nan
            return *grids, latent

        return op

    ops = {name: poisoned(name) for name in ("exact_couple", "exact_mix", "exact_unmix")}
    return SimpleNamespace(**{**vars(reference), **ops}, calls=calls)


def _on_grid(x: Tensor) -> Tensor:
    return x.nan_to_num() if x.is_floating_point() else torch.where(x == OFF_GRID, 0, x)


def test_latents_off_the_grid_are_refused_when_the_chain_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network, x = Network(), torch.randn(1, 4, 3, 3)
    kernels = poisons(after=10**6)
    monkeypatch.setitem(table.NAMESPACES, "reference", kernels)
    chain = sampler(4, backend="reference")
    chain.sample(network, x)[0].sum().backward()
    total = len(kernels.calls)
    monkeypatch.setitem(table.NAMESPACES, "reference", poisons(after=3))
    for call in (chain.sample, chain.invert):
        with pytest.raises(RuntimeError, match=RULE + "latents that left it on the way"):
            call(network, x, x)
    monkeypatch.setitem(table.NAMESPACES, "reference", poisons(after=total - 3))
    image = chain.sample(network, x)
    with pytest.raises(RuntimeError, match=RULE + "latents that left it on the way"):
        image[0].sum().backward()


@pytest.mark.parametrize("stream", ["own", "of torch.cuda.graph", "neither"])
def test_a_capture_of_another_thread_is_seen(stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from dense_attn.triton_kernels import autotune

    current = ["own"]

    @contextmanager
    def entered(other: str) -> Iterator[None]:
        current.append(other)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1] == stream)
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", None)
    assert autotune.is_capturing() == (stream == "own")
    monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", "of torch.cuda.graph")
    assert autotune.is_capturing() == (stream != "neither")
    assert current == ["own"]
