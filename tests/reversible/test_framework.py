"""ReversibleSampler in PyTorch: memory formats, writes in place, transforms, torch.compile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import backends
from chains import Network, Pair, sampler
from torch import Tensor
from torch.autograd import forward_ad

on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))
METHODS = [
    ("edict", True),
    ("edict", False),
    ("bdia", True),
    ("bdia", False),
    ("belm", False),
    ("ddim", False),
]
each_method = pytest.mark.parametrize(("method", "exact"), METHODS)
each_chain = pytest.mark.parametrize(("method", "exact"), METHODS[:-1])
SHAPE = (2, 4, 5, 6)


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    pass


def reordered(pair: Pair) -> Pair:
    """A tensor's values in the other order of memory."""
    order = torch.contiguous_format if not pair[0].is_contiguous() else torch.channels_last
    return tuple(latent.contiguous(memory_format=order) for latent in pair)


def by_order(x: Tensor, t: int) -> Tensor:
    """Rounds by the order of memory, as convolutions do."""
    return torch.tanh(x) * (1 + 1e-3 * x.is_contiguous())


@on_cpu
@pytest.mark.parametrize("method", ["edict", "bdia"])
@pytest.mark.parametrize(
    "eps_fn", [by_order, Network(width=32).requires_grad_(False)], ids=["order", "network"]
)
def test_equal_bits_give_equal_results_in_any_memory(
    method: str, eps_fn: Callable, backend: str
) -> None:
    chain, x = sampler(5, method=method, backend=backend), torch.randn(SHAPE)
    image = chain.sample(eps_fn, x)
    assert all(map(torch.equal, chain.sample(eps_fn, *reordered((x,))), image))
    noise = chain.invert(eps_fn, *image)
    assert all(map(torch.equal, chain.invert(eps_fn, *reordered(image)), noise))
    assert all(map(torch.equal, chain.sample(eps_fn, *reordered(noise)), image))
    one = torch.randn(2, 1, 5, 6)  # an axis of one, which has any stride
    odd = one.as_strided(one.shape, (30, 1, 6, 1))
    assert all(map(torch.equal, chain.sample(by_order, odd), chain.sample(by_order, one)))


@pytest.mark.parametrize("exact", [True, False])
def test_the_order_of_memory(exact: bool) -> None:
    """Exact chains are contiguous, float chains keep the order of x."""
    seen = []

    def eps_fn(x: Tensor, t: int) -> Tensor:
        seen.append(x.is_contiguous())
        return torch.tanh(x)

    for latent in sampler(3, exact=exact).sample(
        eps_fn, torch.randn(SHAPE).to(memory_format=torch.channels_last)
    ):
        assert latent.is_contiguous() is exact
    assert set(seen) == {exact}


@on_cpu
@each_method
def test_a_network_may_write_to_what_it_is_handed(method: str, exact: bool, backend: str) -> None:
    def inside(x: Tensor, t: int) -> Tensor:
        return x.mul_(0.5).sin_()

    def outside(x: Tensor, t: int) -> Tensor:
        return (x * 0.5).sin()

    chain = sampler(5, method=method, exact=exact, dtype=torch.float64, backend=backend)
    results = []
    for eps_fn in (inside, outside):
        x = torch.randn(
            SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
        ).requires_grad_()
        before = x.detach().clone()
        latents = chain.sample(eps_fn, x)
        assert torch.equal(x.detach(), before)
        with torch.no_grad():
            assert all(map(torch.equal, chain.sample(eps_fn, x), latents))
        sum(latent.sum() for latent in latents).backward()
        assert torch.equal(x.detach(), before)
        results.append([*latents, x.grad])
    assert all(map(torch.equal, *results))


def refused(message: str, call: Callable, *arguments: object) -> None:
    with pytest.raises(NotImplementedError, match=f"^{message} must .+, got .+"):
        call(*arguments)


@on_cpu
@each_chain
def test_forward_mode_is_refused(method: str, exact: bool, backend: str) -> None:
    """A tangent would be lost without a word."""
    chain, x = sampler(3, method=method, exact=exact, backend=backend), torch.randn(SHAPE)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        for call in (chain.sample, chain.invert):
            refused("x", call, by_order, dual)
            refused("y", call, by_order, x, dual)
            refused("eps_fn's result", call, lambda x, t: torch.tanh(x) * dual, x)
            refused(
                "eps_fn's result",
                call,
                lambda x, t: torch.tanh(x) * dual,
                x.clone().requires_grad_(),
            )
        chain.sample(by_order, x)


@each_chain
def test_transforms_are_refused(method: str, exact: bool) -> None:
    chain, x = sampler(3, method=method, exact=exact), torch.randn(SHAPE)

    def total(x: Tensor) -> Tensor:
        return chain.sample(by_order, x)[0].sum()

    for transform in (torch.func.grad(total), torch.func.vmap(total), torch.func.jacrev(total)):
        refused("ReversibleSampler", transform, x)
    refused("ReversibleSampler", torch.func.jvp, total, (x,), (x,))


class Watched(Network):
    """Notes whether it is being compiled."""

    def __init__(self) -> None:
        super().__init__()
        self.compiled: list[bool] = []

    def forward(self, x: Tensor, t: int) -> Tensor:
        self.compiled.append(torch.compiler.is_compiling())
        return super().forward(x, t)


@each_method
def test_inside_a_compiled_function(method: str, exact: bool) -> None:
    """The graph breaks there: the network runs eagerly on the way and on the way back."""
    network, chain = Watched(), sampler(3, method=method, exact=exact)
    x = torch.randn(SHAPE, requires_grad=True)

    def loss(x: Tensor) -> Tensor:
        return sum(latent.square().sum() for latent in chain.sample(network, x * 2))

    inputs = [x, *network.parameters()]
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager")
    for _ in range(2):
        got, expected = (torch.autograd.grad(call(x), inputs) for call in (compiled, loss))
        torch.testing.assert_close(got, expected)
    assert not any(network.compiled)


def test_a_compiled_network() -> None:
    network, chain = Network(), sampler(4)
    x = torch.randn(SHAPE, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="aot_eager")
    image = chain.sample(compiled, x)
    with torch.no_grad():
        assert all(map(torch.equal, chain.sample(compiled, *chain.invert(compiled, *image)), image))
    inputs = [x, *network.parameters()]
    got, expected = (
        torch.autograd.grad(chain.sample(eps_fn, x)[0].sum(), inputs)
        for eps_fn in (compiled, network)
    )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
