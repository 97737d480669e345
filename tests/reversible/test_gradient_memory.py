"""Gradients through chains: their memory does not grow, and no tensor loses one silently."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from chains import INVERTIBLE, ONE, Network, leaves, plain, sampler, timesteps, weighted
from torch import Tensor, nn

from dense_attn._memory import peak_extra_bytes
from dense_attn.reversible.sampler import sample_for_latents

pytestmark = pytest.mark.usefixtures("one_thread")


class Wide(nn.Module):
    """A network whose activations are many times its input."""

    def forward(self, x: Tensor, t: int) -> Tensor:
        return x.repeat(256, 1, 1, 1).tanh().mean(0, keepdim=True)


@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
def test_memory_does_not_grow_with_the_steps(method: str, options: dict) -> None:
    saved = {}
    for steps in (6, 60):
        chain, counted = sampler(steps, method=method, **{**options, "gamma": 1.0}), []
        x = torch.randn(ONE, requires_grad=True)

        def pack(tensor: Tensor, counted: list[int] = counted) -> Tensor:
            counted.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            weighted(chain.sample(Wide(), x), "xy")
        saved[steps] = sum(counted)
    assert saved[60] == saved[6]


def test_peak_memory_does_not_grow_with_the_steps() -> None:
    def peak(steps: int, side: int, chain: Callable) -> int:
        x = torch.randn(1, 4, side, side, requires_grad=True)
        extra, _ = peak_extra_bytes(lambda: torch.autograd.grad(chain(steps, x)[0].sum(), x))
        return extra or pytest.skip("no peak of memory on this system")

    def ours(steps: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return sampler(steps, exact=False).sample(Wide(), x)

    def autograd(steps: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return plain(Wide(), timesteps(steps), x, method="edict")

    for chain in (ours, autograd):  # loads code
        peak(1, 9, chain)
    # 41 MB an activation: malloc keeps none that is freed.
    one, three = (peak(steps, 100, ours) for steps in (1, 3))
    assert three < 1.1 * one
    assert peak(3, 100, autograd) > 1.5 * three


def test_nothing_is_recorded_without_need() -> None:
    network, trained, chain, x = (
        Network().requires_grad_(False),
        Network(),
        sampler(3),
        torch.randn(ONE),
    )
    assert not chain.sample(network, x)[0].requires_grad
    assert not chain.sample(lambda x, t: trained(x, t), x)[0].requires_grad
    with torch.no_grad():
        assert not chain.sample(trained, x.requires_grad_())[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(chain.sample(network, x.detach())[0], chain.sample(network, x)[0])


@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
def test_captured_tensors_are_warned_of(method: str, options: dict) -> None:
    """And get no gradient at all, not that of a first step alone."""
    network, (x,), chain = (
        Network(),
        leaves(False, torch.float32),
        sampler(3, method=method, **options),
    )
    loss = chain.sample(lambda x, t: network(x, t), x)[0].sum()
    with pytest.warns(UserWarning, match=r"eps_fn must be an nn.Module .* got 5 tensors"):
        loss.backward()
    assert all(p.grad is None for p in network.parameters())
    for call in (chain.sample, chain.invert):
        assert not call(lambda x, t: network(x, t), x.detach())[1].requires_grad
    network.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler(3).sample(lambda x, t: network(x, t), x)[0].sum().backward()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
def test_a_chain_for_its_latents_alone(method: str, options: dict) -> None:
    """Their gradients are those of `sample`; parameters, owned or captured, get none unasked."""
    network, (x,), chain = Network(), leaves(False), sampler(3, method=method, **options)
    (expected,) = torch.autograd.grad(weighted(chain.sample(network, x), "xy"), x)
    computed = []
    network.first.weight.register_hook(computed.append)
    for eps_fn in (network, lambda x, t: network(x, t)):
        latents = sample_for_latents(chain, eps_fn, x)
        (got,) = torch.autograd.grad(weighted(latents, "xy"), x)
        assert torch.equal(got, expected)
        assert not sample_for_latents(chain, eps_fn, x.detach())[0].requires_grad
    assert not computed
