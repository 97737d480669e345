"""The network of a chain: what it is handed, and what a chain makes of its results."""

from __future__ import annotations

import pytest
import torch
from cases import backends
from chains import ALPHAS, Network, plain, refused, sampler, timesteps
from torch import Tensor, nn

from dense_attn import ReversibleSampler, _checks
from dense_attn._backends import table

SHAPE = (2, 4, 5, 6)
on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))


class Counted(nn.Module):
    """A network that keeps the arguments of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Tensor, object]] = []

    def forward(self, x: Tensor, t: object) -> Tensor:
        self.calls.append((x, t))
        return torch.tanh(x.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_the_network_is_handed(dtype: torch.dtype) -> None:
    for given in (torch.tensor([751, 501]), [751, 501]):
        for exact, calls in (
            (True, 5),
            (False, 4),
        ):  # the first call is repeated to see whether it repeats
            network, x = Counted(), torch.randn(SHAPE)
            ReversibleSampler(ALPHAS, given, dtype=dtype, exact=exact).sample(network, x)
            assert [int(t) for _, t in network.calls] == [751] * (calls - 2) + [501, 501]
            assert {type(t) for _, t in network.calls} == {type(given[0])}
            assert {seen.dtype for seen, _ in network.calls} == {dtype}
            torch.testing.assert_close(network.calls[0][0], x.to(dtype))


def test_a_float_chain_takes_any_network() -> None:
    x = torch.randn(SHAPE)
    image = sampler(4, exact=False).sample(lambda x, t: torch.rand_like(x), x)
    assert image[0].isfinite().all()
    assert sampler(4, exact=False).sample(lambda x, t: x * torch.nan, x)[0].isnan().all()


def test_a_network_that_stops_to_be_deterministic_in_training_mode() -> None:
    network, x = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Dropout(0.5)), torch.randn(SHAPE)
    eps_fn = lambda x, t: network(x)  # noqa: E731
    refused(
        ValueError, "eps_fn must be deterministic for exact inversion", sampler(4).sample, eps_fn, x
    )
    network.eval()
    sampler(4).sample(eps_fn, x)


def test_a_network_may_write_its_result_into_one_buffer() -> None:
    buffer = torch.empty(SHAPE)
    x = torch.randn(SHAPE)
    expected = sampler(6).sample(lambda x, t: torch.tanh(x) * (t / 1000), x)
    got = sampler(6).sample(lambda x, t: torch.mul(torch.tanh(x), t / 1000, out=buffer), x)
    assert all(map(torch.equal, got, expected))
    noise = torch.rand(2)
    calls = iter([*noise.tolist(), *[0.0] * 20])
    refused(
        ValueError,
        "eps_fn must be deterministic",
        sampler(6).sample,
        lambda x, t: buffer.fill_(next(calls)),
        x,
    )


@on_cpu
@pytest.mark.parametrize("shape", [(7,), (3, 5), (0, 4, 8, 8), (1, 1), (2, 3, 4, 5, 6)])
def test_any_shape(shape: tuple[int, ...], backend: str) -> None:
    def network(x: Tensor, t: int) -> Tensor:
        return torch.tanh(x)

    x = torch.randn(shape, dtype=torch.float64)
    for method in ("edict", "bdia", "belm"):
        exact = method != "belm"
        chain = sampler(5, method=method, exact=exact, dtype=torch.float64, backend=backend)
        for got, expected in zip(
            chain.sample(network, x), plain(network, timesteps(5), x, method=method)
        ):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("enabled", [True, False])
def test_inputs_are_not_written_to(enabled: bool) -> None:
    for method in ("edict", "bdia", "belm", "ddim"):
        x = torch.randn(SHAPE, requires_grad=enabled)
        before = x.detach().clone()
        sampler(3, method=method, exact=False).sample(Network(), x)
        assert torch.equal(x.detach(), before)


def test_classifier_free_guidance_inside_the_network() -> None:
    network = Network()

    def guided(x: Tensor, t: int) -> Tensor:
        uncond, text = network(torch.cat([x, x + 0.1]), t).chunk(2)
        return uncond + 7.5 * (text - uncond)

    chain, x = sampler(8), torch.randn(SHAPE)
    image = chain.sample(guided, x)
    assert all(map(torch.equal, chain.sample(guided, *chain.invert(guided, *image)), image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    network, chain, x = Network(), sampler(8), torch.randn(SHAPE)
    with torch.autocast("cpu", dtype), torch.no_grad():
        image = chain.sample(network, x)
        assert all(map(torch.equal, chain.sample(network, *chain.invert(network, *image)), image))
    assert not torch.equal(image[0], chain.sample(network, x)[0])


@pytest.mark.parametrize("method", ["edict", "bdia", "belm", "ddim"])
def test_a_run_asks_for_its_backend_and_looks_at_its_input_once(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, looked, floats = [], [], _checks.floats

    def resolve(backend: str, op: str, x: Tensor) -> str:
        asked.append(op)
        return "reference"

    def counted(argument: str, value: object) -> Tensor:
        looked.append(argument)
        return floats(argument, value)

    monkeypatch.setattr(table, "resolve", resolve)
    monkeypatch.setattr(_checks, "floats", counted)
    sampler(7, method=method, exact=False).sample(Network(), torch.randn(SHAPE))
    assert asked == ["ReversibleSampler"]
    assert looked.count("x") == 1
    assert looked.count("eps_fn's result") >= 6
