"""Chains of rectified flows: round trips to the last bit, formulas written out, gradients."""

from __future__ import annotations

import re
from pathlib import Path

import flows
import forked
import pytest
import torch
from cases import DEVICES, INTERPRETED, backends
from chains import ONE, Network, leaves, weighted
from torch import Tensor

from dense_attn import optimize_latents
from dense_attn._backends import table
from dense_attn.reversible.sampler import sample_for_latents

ROOT = Path(__file__).resolve().parents[2]
on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))
TRITON = ["triton"] * (INTERPRETED or table.missing("triton", "ddim_step") is None)
STEPS = (4, 8, 10, 28, 50)
METHODS = [
    ("edict", {}),
    ("edict", {"exact": False, "alternate": False, "mix": 0.8}),
    ("bdia", {}),
    ("bdia", {"exact": False, "gamma": 0.7}),
    ("belm", {"exact": False}),
    ("euler", {}),  # takes no pair
]
INVERTIBLE = METHODS[:-1]

pytestmark = pytest.mark.usefixtures("one_thread")


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    return all(x.dtype == y.dtype == torch.float64 and torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("method", ["edict", "bdia"])
@pytest.mark.parametrize("backend", backends("reference", "cpu", *TRITON))
def test_round_trips_have_no_differing_bits(
    method: str, shift: float, steps: int, dtype: torch.dtype, backend: str
) -> None:
    if INTERPRETED and (dtype == torch.bfloat16 or steps > 10):
        pytest.skip("the interpreter is slow, and cuts bfloat16 where a GPU rounds")
    network = Network(dtype=dtype).to(DEVICES[backend])
    chain = flows.sampler(steps, shift, method=method, dtype=dtype, backend=backend)
    x = torch.randn(1, 4, 5, 7).to(DEVICES[backend])
    image = chain.sample(network, x)
    noise = chain.invert(network, *image)
    assert equal(chain.sample(network, *noise), image)
    assert (noise[0] - x).abs().max() < 2e-8
    noise = chain.invert(network, x)
    image = chain.sample(network, *noise)
    assert equal(chain.invert(network, *image), noise)
    assert (image[0] - x).abs().max() < 1e-6
    image[0][0, 0, 0, 0] += chain._chain.end.scale  # the control: one bit is seen
    assert not equal(chain.invert(network, *image), noise)


@pytest.mark.full
@pytest.mark.skipif(INTERPRETED, reason="interpreted already")
def test_kernels_of_triton_interpreted() -> None:
    pytest.importorskip("triton")
    options = ("-q", "-rN", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "bits and triton")
    done = forked.run(
        forked.PYTEST,
        *options,
        Path(__file__).name,
        cwd=Path(__file__).parent,
        TRITON_INTERPRET="1",
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\b24 passed", done.stdout), done.stdout[-400:]


@pytest.mark.parametrize("method", ["edict", "bdia"])
def test_backends_give_the_same_bits(method: str) -> None:
    network, x = Network(dtype=torch.float16), torch.randn(2, 4, 9, 3)
    chains = [
        flows.sampler(10, 3.0, method=method, dtype=torch.float16, backend=backend)
        for backend in ("reference", "auto")
    ]
    image, other = (chain.sample(network, x) for chain in chains)
    assert equal(image, other)
    assert equal(*(chain.invert(network, *image) for chain in chains))


@on_cpu
@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize(("method", "options"), METHODS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_chains_are_those_of_the_formulas(
    method: str, options: dict, pair: bool, steps: int, backend: str
) -> None:
    if method == "euler" and pair:
        return
    network, sigmas = Network(dtype=torch.float64), flows.levels(steps, 3.0)
    chain = flows.sampler(
        steps, 3.0, method=method, **options, dtype=torch.float64, backend=backend
    )
    latents = torch.randn(1 + pair, 1, 4, 5, 7, dtype=torch.float64).unbind()
    numbers = {name: value for name, value in options.items() if name != "exact"}
    expected = flows.plain(network, sigmas, *latents, method=method, **numbers)
    tolerance = 1e-6 if chain.exact else 1e-12
    for got, want in zip(chain.sample(network, *latents), expected):
        torch.testing.assert_close(got, want, rtol=0, atol=tolerance)


def test_gamma_1_is_the_additive_leapfrog() -> None:
    """`x_prev = x_next + (sigma_prev - sigma_next)*v(x_t)`, and nothing of x_t itself."""
    sigmas, seen = flows.levels(4, 3.0), []
    latents = [torch.randn(3, dtype=torch.float64) for _ in range(2)]

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append(torch.sin(3 * x) + t / 1000)
        return seen[-1]

    chain = flows.sampler(4, 3.0, method="bdia", exact=False, dtype=torch.float64)
    image, _ = chain.sample(velocity, *latents)
    second = latents[0] + (sigmas[2] - sigmas[0]) * seen[0]
    last = second + (sigmas[4] - sigmas[2]) * seen[2]
    torch.testing.assert_close(image, last, rtol=0, atol=1e-15)
    assert {link.other for link in chain._chain.links} == {0.0}


@on_cpu
@pytest.mark.parametrize(
    ("method", "options", "pair"), [(*m, pair) for m in METHODS for pair in (False, True)][:-1]
)
def test_gradients_are_those_of_plain_autograd(
    method: str, options: dict, pair: bool, backend: str
) -> None:
    """Latents and parameters, in float64: to rounding, but for the grid's own."""
    for steps, tolerance in ((1, 1e-6), (12, 1e-5)):
        network, inputs = Network(dtype=torch.float64), leaves(pair)
        chain = flows.sampler(
            steps, 3.0, method=method, **options, dtype=torch.float64, backend=backend
        )
        wanted = [*inputs, *network.parameters()]
        numbers = {name: value for name, value in options.items() if name != "exact"}
        latents = chain.sample(network, *inputs)
        plain = flows.plain(network, flows.levels(steps, 3.0), *inputs, method=method, **numbers)
        got, expected = (
            torch.autograd.grad(
                weighted(ends, "xy"), wanted, allow_unused=True, materialize_grads=True
            )
            for ends in (latents, plain)
        )
        for ours, theirs in zip(got, expected, strict=True):
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
def test_gradients_of_the_inversion(method: str, options: dict) -> None:
    """Against differences of the chain itself; the grid allows no small ones."""
    network, (x,) = Network(dtype=torch.float64).requires_grad_(False), leaves(False)
    chain = flows.sampler(8, 3.0, method=method, **options, dtype=torch.float64)
    (grad,) = torch.autograd.grad(weighted(chain.invert(network, x), "xy"), x)
    direction, step = torch.randn(ONE, dtype=torch.float64), 1e-3 if chain.exact else 1e-6
    with torch.no_grad():
        up, down = (
            weighted(chain.invert(network, x + sign * step * direction), "xy") for sign in (1, -1)
        )
    torch.testing.assert_close(
        (grad * direction).sum(), (up - down) / (2 * step), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize("exact", [True, False])
def test_float32_networks_to_1e_4(exact: bool) -> None:
    network, (x,) = Network(), leaves(False, torch.float32)
    latents = flows.sampler(10, 3.0, exact=exact).sample(network, x)
    got = torch.autograd.grad(weighted(latents, "xy"), [x, *network.parameters()])
    wide = Network(dtype=torch.float64)
    wide.load_state_dict(network.state_dict())
    inputs = [x.detach().double().requires_grad_(), *wide.parameters()]
    latents = flows.plain(wide, flows.levels(10, 3.0), inputs[0], method="edict")
    expected = torch.autograd.grad(weighted(latents, "xy"), inputs)
    for ours, theirs in zip(got, expected, strict=True):
        assert (ours.double() - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(("method", "options"), INVERTIBLE)
def test_memory_does_not_grow_with_the_steps(method: str, options: dict) -> None:
    saved = []
    for steps in (5, 50):
        chain = flows.sampler(steps, 3.0, method=method, **{**options, "gamma": 1.0})
        x, counted = torch.randn(ONE, requires_grad=True), []

        def pack(tensor: Tensor, counted: list[int] = counted) -> Tensor:
            counted.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            sample_for_latents(chain, lambda x, t: x.tanh(), x)
        saved.append(sum(counted))
    assert saved[0] == saved[1] > 0


def test_the_noise_of_a_flow_is_optimised(tmp_path: Path) -> None:
    """A run goes on from a file, on the same schedule alone."""

    def loss(image: Tensor) -> Tensor:
        return (image - 0.5).square().mean()

    network, noise = Network().requires_grad_(False), torch.randn(ONE)
    how = {"clip": 0.03, "noise": 0.0, "progress": False}
    functions = network, lambda x: x, loss, noise
    whole = optimize_latents(flows.sampler(4), *functions, steps=8, **how)
    assert whole.losses[-1] < whole.losses[0]
    half = optimize_latents(flows.sampler(4), *functions, steps=4, **how)
    torch.save(half.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    rest = optimize_latents(flows.sampler(4), *functions, steps=4, **how, state=state)
    assert rest.losses == whole.losses
    with pytest.raises(ValueError, match=r"^sampler must be that of state, with timesteps"):
        optimize_latents(flows.sampler(4, 3.0), *functions, steps=4, **how, state=state)


def rows() -> list[tuple[float, int, dict[str, float]]]:
    """The documentation's table: shift, network calls, the distances that are said."""
    page = (ROOT / "docs/reversible.md").read_text("utf-8")
    names = ("EDICT from Euler", "leapfrog from Euler", "Euler", "EDICT", "leapfrog")
    lines = re.findall(r"^\| (\d) \| (\d+) \|((?: \d+\.\d+ % \|)+)$", page, re.MULTILINE)
    return [
        (float(shift), int(calls), dict(zip(names, map(float, re.findall(r"[\d.]+", said)))))
        for shift, calls, said in lines
    ]


def close(measured: float, said: float) -> bool:
    return abs(100 * measured - said) <= 0.051


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_price_in_distance_from_euler_is_as_documented(shift: float) -> None:
    """On the toy field, with as many network calls."""
    found = [(calls, said) for row, calls, said in rows() if row == shift and calls <= 28]
    assert [calls for calls, _ in found] == [8, 16, 28]
    for calls, said in found:
        for name, method in (("EDICT", "edict"), ("leapfrog", "bdia")):
            assert close(flows.from_euler(method, calls, shift, calls), said[f"{name} from Euler"])


@pytest.mark.full
def test_float_round_trips_lose_what_is_documented() -> None:
    """To a factor of three: rounding differs between machines."""
    page = (ROOT / "docs/reversible.md").read_text("utf-8")
    said = re.findall(r"^\| (EDICT|leapfrog), (float\d\d) \|((?: \S+ \|){3})$", page, re.MULTILINE)
    assert len(said) == 6
    for name, dtype, numbers in said:
        method, dtype = {"EDICT": "edict", "leapfrog": "bdia"}[name], getattr(torch, dtype)
        noise = flows.toy_noise().to(dtype)
        for steps, number in zip((10, 28, 50), re.findall(r"[^ |]+", numbers), strict=True):
            chain = flows.sampler(steps, 3.0, method=method, exact=False, dtype=dtype)
            back, _ = chain.invert(flows.toy_velocity, *chain.sample(flows.toy_velocity, noise))
            lost = (back.double() - noise.double()).abs().max().item()
            assert float(number) / 3 < lost < float(number) * 3


@pytest.mark.full
def test_every_figure_of_the_price() -> None:
    assert [(shift, calls) for shift, calls, _ in rows()] == [
        (shift, calls) for shift in (1, 3) for calls in (8, 16, 28, 56, 100)
    ]
    for shift, calls, said in rows():
        for name, method in (("Euler", "euler"), ("EDICT", "edict"), ("leapfrog", "bdia")):
            assert close(flows.from_euler(method, calls, shift, 4000), said[name])
            if name != "Euler":
                near = flows.from_euler(method, calls, shift, calls)
                assert close(near, said[f"{name} from Euler"])
