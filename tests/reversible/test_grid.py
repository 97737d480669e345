"""The integer grid of exact chains: its ends, its bits, and how kernels say that it was left."""

from __future__ import annotations

import math
import pickle
from types import SimpleNamespace

import pytest
import raw
import torch
from cases import backends
from chains import ALPHAS, EXACT_STEPS, LATENTS, exact_arguments, sampler, timesteps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dense_attn
from dense_attn import ReversibleSampler, reference
from dense_attn.reversible import grid
from dense_attn.reversible.grid import from_grid, to_grid


@settings(max_examples=200, deadline=None)
@given(scale=st.floats(1e-9, 1e3), limit=st.integers(0, 50), seed=st.integers(0, 10**6))
def test_float64_latents_give_the_grid_back(scale: float, limit: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-(2**limit), 2**limit + 1, (100,), generator=generator)
    z[:4] = torch.tensor([2**limit, -(2**limit), 2**limit - 1, 1 - 2**limit])
    assert torch.equal(to_grid(from_grid(z, scale), scale, "x"), z)


def test_the_grid_ends() -> None:
    scale = 0.3 * 2.0**-26
    assert to_grid(torch.tensor([2.0**50 * scale], dtype=torch.float64), scale, "x").item() == 2**50
    for value in (2.0**50 * scale * (1 + 1e-9), math.inf, math.nan):
        with pytest.raises(
            ValueError, match=r"x must be finite and at most .* in size for exact=True, got"
        ):
            to_grid(torch.tensor([0.0, value], dtype=torch.float64), scale, "x")


@pytest.mark.parametrize(
    ("steps", "mix", "bits"), [(50, 0.93, 26), (200, 0.93, 23), (1000, 0.99, 26), (9, 1.0, 26)]
)
def test_bits_of_the_grid(steps: int, mix: float, bits: int) -> None:
    chain = sampler(steps, mix=mix)._chain
    assert chain.start.scale == pytest.approx(
        ALPHAS[timesteps(steps)[0]].item() ** 0.5 * 2.0**-bits, rel=1e-12
    )


def test_a_chain_that_would_not_fit_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"timesteps must be at most 2\d\d with mix=0.93 .* got 1000 steps"
    ) as refusal:
        sampler(1000, mix=0.93)
    enough = float(str(refusal.value).split("mix at least ")[1].split(",")[0])
    sampler(1000, mix=enough)
    with pytest.raises(ValueError, match="timesteps must be at most"):
        sampler(1000, mix=enough - 0.001)
    longest = int(str(refusal.value).split("at most ")[1].split()[0])
    every_fourth = range(999, 0, -4)
    ReversibleSampler(ALPHAS, every_fourth[:longest])
    with pytest.raises(ValueError, match="timesteps must be at most"):
        ReversibleSampler(ALPHAS, every_fourth[: longest + 1])


def failing(error: Exception) -> SimpleNamespace:
    """Kernels that raise, whatever they are given."""

    def op(*_: object) -> None:
        raise error

    return SimpleNamespace(exact_couple=op, exact_leapfrog=op, exact_mix=op, exact_unmix=op)


@pytest.mark.parametrize("step", EXACT_STEPS)
def test_why_a_kernel_failed_is_known_by_type(step: str) -> None:
    """Whatever its words: the reference says whether the grid was left, and where to."""
    op, changes = EXACT_STEPS[step]
    given = exact_arguments((7,), c_eps=1.0, step=1.0, **changes)
    good = [given[name] for name in raw.argument_names(op)]
    far = {name: x.fill_(2**52) for name, x in given.items() if name in LATENTS}
    bad = [{**given, **far}[name] for name in raw.argument_names(op)]
    good = [x.clone().zero_() if isinstance(x, Tensor) else x for x in good]
    with pytest.raises(grid.OffGridError) as found:
        grid.call(failing(RuntimeError("something else")), op, *bad)
    assert abs(found.value.coordinate) > 2**50
    words = RuntimeError("eps must be finite and keep the latents within the grid of 2^50 steps")
    for error, arguments in ((words, good), (torch.OutOfMemoryError("too little"), bad)):
        with pytest.raises(type(error)) as left_alone:
            grid.call(failing(error), op, *arguments)
        assert left_alone.value is error


@pytest.mark.parametrize("backend", backends("reference", "cpu"))
@pytest.mark.parametrize("method", ["edict", "bdia"])
def test_a_run_off_the_grid_is_told_by_its_cause(method: str, backend: str) -> None:
    chain, x = sampler(4, method=method, backend=backend), torch.ones(2, 3)
    calls = [
        lambda: chain.sample(lambda x, t: x * torch.nan, x),
        lambda: chain.sample(torch.tanh, x * torch.inf),
        lambda: chain.sample(lambda x, t: torch.tanh(x), x, torch.full_like(x, 1e20)),
    ]
    for call, kind in zip(calls, (dense_attn.OffGridError, ValueError, ValueError)):
        with pytest.raises(kind, match="must be finite and") as refusal:
            call()
        assert grid.left(refusal.value)

    def network(x: Tensor, t: int) -> Tensor:
        raise RuntimeError("eps_fn's result must be finite and on the grid of its own")

    with pytest.raises(RuntimeError, match="of its own") as refusal:
        chain.sample(network, x)
    assert not grid.left(refusal.value)


def test_an_error_off_the_grid_can_be_sent() -> None:
    error = pickle.loads(pickle.dumps(reference.off_grid(2.0**51)))
    assert error.coordinate == 2.0**51
    assert str(error).endswith("within the grid of 2^50 steps, got 2.2518e+15 steps")


@pytest.mark.parametrize("backend", backends("reference", "cpu"))
@pytest.mark.parametrize("method", ["edict", "bdia"])
def test_the_error_knows_the_step(method: str, backend: str) -> None:
    """A step counted from the noise, also on the way to it."""
    chain, x = sampler(4, method=method, backend=backend), torch.ones(2, 3)
    late = chain.timesteps[2]
    for run, step in ((chain.sample, 2), (chain.invert, 2)):
        with pytest.raises(dense_attn.OffGridError, match="at step 2 ") as left:
            run(lambda x, t: x * (1e30 if t == late else 0.1), x, x)
        assert left.value.step == step
        assert abs(left.value.coordinate) > 2**50
