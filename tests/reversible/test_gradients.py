"""Gradients through reversible samplers are those of plain autograd."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import backends
from chains import (
    ALPHAS,
    INVERTIBLE,
    METHODS,
    ONE,
    Network,
    leaves,
    plain,
    sampler,
    timesteps,
    weighted,
)
from torch import Tensor, nn

from dense_attn import ReversibleSampler

on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))


@pytest.fixture(autouse=True)
def quick(one_thread: None) -> None:
    pass


def close(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        assert (
            ours.double() - theirs.double()
        ).abs().max() <= tolerance * theirs.double().abs().max()


@on_cpu
@pytest.mark.parametrize("used", ["x", "y", "xy"])
@pytest.mark.parametrize(
    ("method", "options", "pair"), [(*m, pair) for m in METHODS for pair in (False, True)][:-1]
)
def test_gradients_are_those_of_plain_autograd(
    method: str, options: dict, pair: bool, used: str, backend: str
) -> None:
    """To 1e-4 of a chain of float64, for latents and parameters; but for the grid, to rounding."""
    for steps, tolerance in ((1, 1e-6), (2, 1e-6), (12, 1e-5)):
        network, inputs = Network(dtype=torch.float64), leaves(pair)
        chain = sampler(steps, method=method, **options, dtype=torch.float64, backend=backend)
        parameters = [*inputs, *network.parameters()]
        loss = weighted(chain.sample(network, *inputs), used)
        got = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        numbers = {name: value for name, value in options.items() if name != "exact"}
        reference = weighted(
            plain(network, timesteps(steps), *inputs, method=method, **numbers), used
        )
        expected = torch.autograd.grad(
            reference, parameters, allow_unused=True, materialize_grads=True
        )
        torch.testing.assert_close(loss, reference, rtol=1e-4, atol=1e-4)
        close(got, expected, tolerance)


@on_cpu
@pytest.mark.parametrize("exact", [True, False])
def test_float32_networks_to_1e_4(exact: bool, backend: str) -> None:
    for steps in (10, 50) if exact else (10,):
        network, (x,) = Network(), leaves(False, torch.float32)
        loss = weighted(sampler(steps, exact=exact, backend=backend).sample(network, x), "xy")
        got = torch.autograd.grad(loss, [x, *network.parameters()])
        wide = Network(dtype=torch.float64)
        wide.load_state_dict(network.state_dict())
        inputs = [x.detach().double().requires_grad_(), *wide.parameters()]
        latents = plain(wide, timesteps(steps), inputs[0], method="edict")
        expected = torch.autograd.grad(weighted(latents, "xy"), inputs)
        assert [grad.dtype for grad in got] == [torch.float32] * len(got)
        close(got, expected, 1e-4)


@on_cpu
@pytest.mark.parametrize("used", ["x", "y", "xy"])
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
def test_gradients_of_the_inversion(
    method: str, options: dict, pair: bool, used: str, backend: str
) -> None:
    """Against differences of the chain itself; the grid allows no small ones."""
    for steps in (1, 2, 9):
        network, inputs = Network(dtype=torch.float64).requires_grad_(False), leaves(pair)
        chain = sampler(steps, method=method, **options, dtype=torch.float64, backend=backend)
        loss = weighted(chain.invert(network, *inputs), used)
        got = torch.autograd.grad(loss, inputs, allow_unused=True, materialize_grads=True)
        for which, grad in enumerate(got):
            moved, step = [x.detach() for x in inputs], 1e-3 if chain.exact else 1e-6
            slope = torch.zeros(())
            direction = torch.randn(ONE, dtype=torch.float64)
            for sign in (1, -1):
                moved[which] = inputs[which].detach() + sign * step * direction
                slope = slope + sign * weighted(chain.invert(network, *moved), used) / (2 * step)
            torch.testing.assert_close((grad * direction).sum(), slope, rtol=1e-3, atol=1e-4)


@on_cpu
def test_memory_formats_and_strides(backend: str) -> None:
    """Channels last, a slice, a transpose: the same values, and a gradient in x's shape."""
    network, chain = Network(), sampler(5, backend=backend)
    wide = torch.randn(2, 4, 6, 12)
    expected = chain.sample(network, wide[..., ::2].contiguous())
    for x in (wide[..., ::2], wide[..., ::2].contiguous(memory_format=torch.channels_last)):
        x = x.detach().requires_grad_()
        got = chain.sample(network, x)
        for ours, theirs in zip(got, expected):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert torch.autograd.grad(got[0].sum(), x)[0].shape == x.shape


@on_cpu
@pytest.mark.parametrize(("method", "options"), METHODS)
def test_an_empty_batch(method: str, options: dict, backend: str) -> None:
    x = torch.randn(0, 4, 5, 6, requires_grad=True)
    network, chain = Network(), sampler(3, method=method, **options, backend=backend)
    sum(latent.sum() for latent in chain.sample(network, x)).backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.abs().sum() == 0 for p in network.parameters())


def test_a_second_derivative_is_refused() -> None:
    network, (x,) = Network(dtype=torch.float64), leaves(False)
    for options in ({}, {"method": "bdia"}):
        latents = sampler(3, **options, dtype=torch.float64).sample(network, x)
        (grad,) = torch.autograd.grad(latents[0].sum(), x, create_graph=True)
        with pytest.raises(
            RuntimeError, match="ReversibleSampler must be differentiated once, got a second"
        ):
            grad.sum().backward()


@pytest.mark.parametrize("exact", [True, False])
def test_autocast_is_that_of_the_forward_pass(exact: bool) -> None:
    """The network runs again in bfloat16 where backward is outside of autocast, and vice versa."""
    for inside in (True, False):
        network, (x,) = Network(), leaves(False, torch.float32)
        seen = []
        network.last.register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.dtype)
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            loss = sampler(4, exact=exact).sample(network, x)[0].sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
            loss.backward()
        assert set(seen) == {torch.bfloat16 if inside else torch.float32}
        assert all(p.grad.abs().sum() > 0 for p in network.parameters())


def test_autocast_around_both_passes() -> None:
    network, (x,) = Network(), leaves(False, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        sampler(4).sample(network, x)[0].sum().backward()
    got = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        latents = plain(network, timesteps(4), x.detach(), method="edict")
    latents[0].sum().backward()
    for ours, p in zip(got, network.parameters()):
        torch.testing.assert_close(ours, p.grad, rtol=0.05, atol=0.05 * p.grad.abs().max().item())


class Attentive(nn.Module):
    """A network of other bits when it records, as from kernels chosen by whether a gradient is."""

    def forward(self, x: Tensor, t: int) -> Tensor:
        return torch.tanh(x) * (1 + 1e-6 * torch.is_grad_enabled())


def test_a_network_that_rounds_otherwise_when_it_records() -> None:
    (x,) = leaves(False)
    sampler(20).sample(Attentive(), x)[
        0
    ].sum().backward()  # a way back that missed its start would be refused


def test_a_way_back_that_misses_its_start_is_seen() -> None:
    state = {"shift": 0.0}

    def network(x: Tensor, t: int) -> Tensor:
        return torch.tanh(x) + state["shift"]

    for options, error in (({}, ValueError), ({"exact": False}, None)):
        (x,) = leaves(False, torch.float32)
        loss = sampler(6, **options).sample(network, x)[0].sum()
        state["shift"] += 0.3
        if error:
            with pytest.raises(
                error, match="eps_fn must be deterministic for exact inversion, got a way back"
            ):
                loss.backward()
        else:
            with pytest.warns(
                UserWarning, match="the way back must lead to the latents of the start"
            ):
                loss.backward()


@pytest.mark.parametrize("forward", [True, False])
def test_growing_errors_are_refused(forward: bool) -> None:
    """BDIA with gamma below 1: a handful of steps can be inverted, also for a gradient."""
    x = torch.randn(ONE)
    for steps, fits in ((7, True), (8, False)):  # 0.5^-6 = 64, 0.5^-7 = 128
        chain = sampler(steps, method="bdia", gamma=0.5, exact=False)
        call, network = chain.sample if forward else chain.invert, Network().requires_grad_(forward)
        if fits:
            call(network, x)
        else:
            with pytest.raises(
                ValueError, match=r"gamma must be large enough for .* got 0.5, 128 times"
            ):
                call(network, x)
            with torch.no_grad():
                assert chain.sample(network, x)[0].isfinite().all()


def test_half_precision_latents() -> None:
    network = Network(dtype=torch.bfloat16)
    for exact in (True, False):
        chain = ReversibleSampler(ALPHAS, timesteps(6), exact=exact, dtype=torch.bfloat16)
        x = torch.randn(ONE, dtype=torch.bfloat16, requires_grad=True)
        image = chain.sample(network, x)[0]
        assert image.dtype == (torch.float64 if exact else torch.bfloat16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # bfloat16 floats do miss their start
            image.sum().backward()
        assert x.grad.dtype == torch.bfloat16
        assert x.grad.isfinite().all()
