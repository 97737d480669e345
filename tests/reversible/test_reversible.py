"""Reversible samplers: round trips to the last bit, plain implementations, diffusers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import backends
from chains import ALPHAS, Network, Pair, plain, sampler, timesteps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_attn import ReversibleSampler

on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))
CHAINS = [  # method, steps, mix
    *(("edict", steps, 0.93) for steps in (10, 50, 200)),
    ("edict", 1000, 0.99),
    *(("bdia", steps, 1.0) for steps in (10, 50, 200, 1000)),
]
SHORT = [("edict", 10, 0.93), ("bdia", 10, 1.0)]
LEAPFROGS = [
    ("bdia", {"exact": False}),
    ("bdia", {"exact": False, "gamma": 0.7}),
    ("belm", {"exact": False}),
]
METHODS = [
    ("edict", {"exact": False}),
    ("edict", {"exact": False, "alternate": False, "mix": 0.8}),
    *LEAPFROGS,
    ("ddim", {"exact": False}),
]


def equal(a: Pair, b: Pair) -> bool:
    return all(x.dtype == y.dtype == torch.float64 and torch.equal(x, y) for x, y in zip(a, b))


def function(dtype: torch.dtype, gain: float = 1.0) -> Callable[[Tensor, int], Tensor]:
    network = Network(dtype=dtype)
    return lambda x, t: gain * network(x, t)


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    pass


@on_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "steps", "mix"), CHAINS)
def test_round_trips_have_no_differing_bits(
    method: str, steps: int, mix: float, dtype: torch.dtype, backend: str
) -> None:
    network, chain = (
        function(dtype),
        sampler(steps, method=method, mix=mix, dtype=dtype, backend=backend),
    )
    x = torch.randn(1, 4, 5, 7)
    image = chain.sample(network, x)
    noise = chain.invert(network, *image)
    assert equal(chain.sample(network, *noise), image)
    assert equal(chain.sample(network, noise[0]), image)
    assert (noise[0] - x).abs().max() < 2e-8
    if steps == 1000:
        return
    if (
        method == "edict" and steps == 200
    ):  # x and y part by mix^-400 on the way: of a strong network, beyond the grid
        network = function(dtype, gain=0.01)
    noise = chain.invert(network, x)
    image = chain.sample(network, *noise)
    assert equal(chain.invert(network, *image), noise)
    assert (image[0] - x).abs().max() < 1e-6


@on_cpu
@pytest.mark.parametrize(("method", "steps", "mix"), SHORT)
def test_one_grid_step_is_seen(method: str, steps: int, mix: float, backend: str) -> None:
    """The negative control: the image differs in the last bit of one pixel."""
    network, chain = (
        function(torch.float32),
        sampler(steps, method=method, mix=mix, backend=backend),
    )
    image = chain.sample(network, torch.randn(1, 4, 5, 7))
    noise = chain.invert(network, *image)
    scale = chain._chain.end.scale
    image[0][0, 0, 0, 0] += scale
    assert not equal(chain.invert(network, *image), noise)


@pytest.mark.skipif(bool(backends("cpu")[0].marks), reason="no CPU kernels")
@pytest.mark.parametrize(("method", "steps", "mix"), CHAINS[:3] + CHAINS[4:6])
def test_backends_give_the_same_bits(method: str, steps: int, mix: float) -> None:
    network, x = function(torch.float16), torch.randn(2, 4, 9, 3)
    chains = [
        sampler(steps, method=method, mix=mix, dtype=torch.float16, backend=b)
        for b in ("reference", "cpu")
    ]
    image, other = (chain.sample(network, x) for chain in chains)
    assert equal(image, other)
    assert equal(*(chain.invert(network, *image) for chain in chains))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    method=st.sampled_from(["edict", "bdia"]),
    mix=st.floats(0.5, 1.0),
    alternate=st.booleans(),
    steps=st.integers(1, 12),
    final=st.sampled_from([None, 1.0, 0.9]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    shape=st.sampled_from([(3,), (2, 5), (0, 4), (1, 2, 3, 1, 2)]),
)
def test_any_chain_is_undone_exactly(
    seed: int,
    method: str,
    mix: float,
    alternate: bool,
    steps: int,
    final: float | None,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    generator = torch.Generator().manual_seed(seed)
    schedule = (
        torch.rand(30, generator=generator, dtype=torch.float64)
        .clamp(1e-3)
        .sort(descending=True)
        .values
    )
    times = torch.randperm(30, generator=generator)[:steps].sort(descending=True).values
    options = {
        "method": method,
        "mix": mix,
        "alternate": alternate,
        "final_alpha_cumprod": final,
        "dtype": dtype,
    }
    chain = ReversibleSampler(schedule, times, **options)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.sin(3 * x + t) + x.mean() if x.numel() else x

    noise = (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
    image = chain.sample(network, *noise)
    back = chain.invert(network, *image)
    assert equal(chain.sample(network, *back), image)
    assert equal(chain.invert(network, *chain.sample(network, *back)), back)
    for got, expected in zip(back, noise):
        torch.testing.assert_close(got, expected.double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("steps", [1, 2, 9])
@on_cpu
def test_float_chains_are_those_of_the_papers(
    method: str, options: dict, steps: int, backend: str
) -> None:
    network = Network(dtype=torch.float64)
    chain = sampler(steps, method=method, **options, dtype=torch.float64, backend=backend)
    x, y = torch.randn(2, 1, 4, 5, 7, dtype=torch.float64)
    numbers = {name: value for name, value in options.items() if name != "exact"}
    for pair in ((x,),) if method == "ddim" else ((x,), (x, y)):
        expected = plain(network, timesteps(steps), *pair, method=method, **numbers)
        for got, want in zip(chain.sample(network, *pair), expected):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "options"), [("edict", {}), ("edict", {"alternate": False}), ("bdia", {})]
)
@pytest.mark.parametrize("steps", [1, 2, 9])
@on_cpu
def test_exact_chains_are_those_of_the_papers(
    method: str, options: dict, steps: int, backend: str
) -> None:
    network = Network(dtype=torch.float64)
    x = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    got = sampler(steps, method=method, **options, dtype=torch.float64, backend=backend).sample(
        network, x
    )
    for latent, expected in zip(got, plain(network, timesteps(steps), x, method=method, **options)):
        torch.testing.assert_close(latent, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), LEAPFROGS)
def test_leapfrogs_are_undone_in_floats(method: str, options: dict) -> None:
    network, chain = (
        Network(dtype=torch.float64),
        sampler(10, method=method, **options, dtype=torch.float64),
    )
    noise = torch.randn(2, 1, 4, 5, 7, dtype=torch.float64).unbind()
    for got, expected in zip(chain.invert(network, *chain.sample(network, *noise)), noise):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


def test_an_image_alone_is_inverted_by_one_ddim_step_and_the_leapfrog() -> None:
    network, chain = (
        function(torch.float64),
        sampler(10, method="bdia", exact=False, dtype=torch.float64),
    )
    image = torch.randn(1, 4, 5, 7, dtype=torch.float64)
    a = (ALPHAS[0] / ALPHAS[1]).sqrt()
    b = (1 - ALPHAS[0]).sqrt() - a * (1 - ALPHAS[1]).sqrt()
    neighbour = (image - b * network(image, 1)) / a
    for got, expected in zip(chain.invert(network, image), chain.invert(network, image, neighbour)):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_float_round_trips_lose_the_digits_that_they_must() -> None:
    """EDICT in floats: errors grow as mix^(-2*steps), to about 1e-3 after 50 steps of float32."""
    network, errors = Network(dtype=torch.float64), {}
    for dtype in (torch.float32, torch.float64):
        chain = sampler(50, exact=False, dtype=dtype)
        x = torch.randn(1, 4, 8, 8, dtype=dtype)
        back = chain.invert(network.to(dtype), *chain.sample(network, x))
        errors[dtype] = (back[0] - x).abs().max().item()
    assert 1e-5 < errors[torch.float32] < 1e-1
    assert errors[torch.float64] < 1e-6 * errors[torch.float32]


@on_cpu
@pytest.mark.parametrize(
    ("steps", "offset", "to_one"), [(10, 0, False), (50, 1, False), (20, 1, True)]
)
def test_ddim_is_that_of_diffusers(steps: int, offset: int, to_one: bool, backend: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=to_one,
        steps_offset=offset,
    )
    scheduler.set_timesteps(steps)
    network, noise = function(torch.float32), torch.randn(1, 4, 5, 7)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
    schedule = (scheduler.alphas_cumprod, scheduler.timesteps)
    options = {"final_alpha_cumprod": scheduler.final_alpha_cumprod, "backend": backend}
    got, same = ReversibleSampler(*schedule, method="ddim", **options).sample(network, noise)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-4)
    assert got is same
    image = ReversibleSampler(*schedule, mix=1.0, **options).sample(network, noise)[0]
    # EDICT without its mix is DDIM with the other's eps.
    assert (image - x).abs().mean() < 0.1 * x.abs().mean()


def test_a_pair_of_leapfrogs_is_two_neighbours_in_time() -> None:
    """The last latent and the one before it come out, for odd and even numbers of steps."""
    for steps in (2, 3, 4, 5):
        chain = sampler(steps, method="bdia", exact=False, dtype=torch.float64)
        x, y = torch.full((2, 1), 2.0).double().unbind()
        image, before = chain.sample(
            lambda x, t: torch.zeros_like(x), x, ALPHAS[chain.timesteps[1]] * 0 + y
        )
        noise = chain.invert(lambda x, t: torch.zeros_like(x), image, before)
        torch.testing.assert_close(noise, (x, y))
        reference = plain(lambda x, t: torch.zeros_like(x), chain.timesteps, x, y, method="bdia")
        torch.testing.assert_close((image, before), reference)
