"""Samplers from the schedulers of diffusers: their steps, their kinds, what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace

import flows
import pytest
import torch
from chains import ALPHAS, Network, refused
from torch import Tensor

from dense_attn import ReversibleSampler

pytestmark = pytest.mark.usefixtures("one_thread")
FLOWS = {  # the scheduler's options, and those of set_timesteps
    "plain": ({}, {"num_inference_steps": 8}),
    "shift": ({"shift": 3.0}, {"num_inference_steps": 28}),
    "one step": ({"shift": 3.0}, {"num_inference_steps": 1}),
    "few sigmas": ({"shift": 3.0}, {"sigmas": [1.0, 0.75, 0.5, 0.25]}),
    "few timesteps": ({}, {"timesteps": [999.0, 937.0, 833.0, 624.0]}),
    "dynamic": ({"use_dynamic_shifting": True}, {"num_inference_steps": 10, "mu": 1.15}),
    "linear": (
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"num_inference_steps": 10, "mu": 1.15},
    ),
    "terminal": ({"shift": 3.0, "shift_terminal": 0.1}, {"num_inference_steps": 10}),
    "karras": ({"shift": 3.0, "use_karras_sigmas": True}, {"num_inference_steps": 10}),
    "exponential": ({"shift": 3.0, "use_exponential_sigmas": True}, {"num_inference_steps": 10}),
    "beta": ({"shift": 3.0, "use_beta_sigmas": True}, {"num_inference_steps": 10}),
    "inverted": ({"invert_sigmas": True}, {"num_inference_steps": 10}),
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def made(name: str, how: dict | None = None, **options: object) -> object:
    """A scheduler of diffusers that is set to its steps."""
    scheduler = getattr(pytest.importorskip("diffusers"), name)(**options)
    scheduler.set_timesteps(**(how or {"num_inference_steps": 10}))
    return scheduler


def stepped(scheduler: object, network: Network, x: Tensor) -> Tensor:
    """The chain of the scheduler's own steps."""
    with torch.no_grad():
        for t in scheduler.timesteps:
            fed = scheduler.scale_model_input(x, t) if hasattr(scheduler, "alphas_cumprod") else x
            x = scheduler.step(network(fed, t), t, x).prev_sample
    return x


@pytest.mark.parametrize("name", FLOWS)
def test_euler_is_the_flow_schedulers_own_step(name: str) -> None:
    """To the rounding of float32; and the same schedule's pairs come back to the bit."""
    options, how = FLOWS[name]
    if name == "beta":
        pytest.importorskip("scipy")
    scheduler = made("FlowMatchEulerDiscreteScheduler", how, **options)
    network, x = Network().requires_grad_(False), torch.randn(1, 4, 5, 7)
    chain = ReversibleSampler.from_scheduler(scheduler, method="euler")
    got, same = chain.sample(network, x)
    assert got is same
    torch.testing.assert_close(got, stepped(scheduler, network, x), rtol=1e-6, atol=1e-6)
    assert len(chain.timesteps) == len(scheduler.timesteps)
    for method in ("edict", "bdia"):
        chain = ReversibleSampler.from_scheduler(scheduler, method=method)
        image = chain.sample(network, x)
        assert all(map(torch.equal, chain.sample(network, *chain.invert(network, *image)), image))


def test_the_network_is_handed_the_schedulers_timesteps() -> None:
    scheduler = made("FlowMatchEulerDiscreteScheduler", FLOWS["few timesteps"][1])
    seen = []
    chain = ReversibleSampler.from_scheduler(scheduler, method="euler")
    chain.sample(lambda x, t: seen.append(t) or x, torch.randn(3))
    assert torch.equal(torch.stack(seen), scheduler.timesteps)
    scheduler.timesteps.zero_()  # the chain's stay
    assert not torch.equal(torch.stack(seen), scheduler.timesteps)


def test_flow_sigmas_of_schedulers_that_have_two_kinds() -> None:
    """Wan's: alphas_cumprod is there, and not what is sampled on."""
    for name in ("UniPCMultistepScheduler", "DPMSolverMultistepScheduler"):
        options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
        scheduler = made(name, **options)
        chain = ReversibleSampler.from_scheduler(scheduler, method="euler")
        x, network = torch.randn(3), lambda x, t: torch.tanh(x)
        expected, _ = flows.plain(network, scheduler.sigmas.tolist(), x, method="euler")
        torch.testing.assert_close(chain.sample(network, x)[0], expected)
        with pytest.raises(ValueError, match=r"^scheduler's sigmas must be in \[0, 1\], got"):
            ReversibleSampler.from_scheduler(
                made("DPMSolverMultistepScheduler", use_karras_sigmas=True, **options)
            )


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DDIMScheduler", {"set_alpha_to_one": False, "steps_offset": 1}),
        ("DDIMScheduler", {"timestep_spacing": "trailing"}),
        ("DDPMScheduler", {}),
        ("LCMScheduler", {}),
        ("CogVideoXDDIMScheduler", {}),
    ],
)
def test_noise_schedules_are_those_of_the_constructor(name: str, options: dict) -> None:
    scheduler = made(name, **options, **({} if "Cog" in name else NOISE))
    final = getattr(scheduler, "final_alpha_cumprod", 1.0)
    tables = scheduler.alphas_cumprod, scheduler.timesteps
    x, network = torch.randn(1, 4, 5, 7), Network().requires_grad_(False)
    for options in ({"method": "edict"}, {"method": "bdia"}, {"method": "ddim"}):
        found = ReversibleSampler.from_scheduler(scheduler, **options)
        chain = ReversibleSampler(*tables, final_alpha_cumprod=final, **options)
        assert found._chain == chain._chain
        assert all(map(torch.equal, found.sample(network, x), chain.sample(network, x)))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPMSolverMultistepScheduler", {"solver_order": 1}),
        ("DPMSolverMultistepScheduler", {"solver_order": 1, "use_karras_sigmas": True}),
        ("UniPCMultistepScheduler", {"solver_order": 1, "disable_corrector": list(range(10))}),
        ("EulerDiscreteScheduler", {}),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "timestep_spacing": "trailing"}),
    ],
)
def test_ddim_is_the_first_order_step_of_other_schedulers(name: str, options: dict) -> None:
    """On their sigmas: Euler's latents are those of DDIM by the scale that makes them noise."""
    scheduler = made(name, **options, **NOISE)
    network, x = Network().requires_grad_(False), torch.randn(1, 4, 5, 7)
    chain = ReversibleSampler.from_scheduler(scheduler, method="ddim")
    own = x * (1 + scheduler.sigmas[0] ** 2).sqrt() if name.startswith("Euler") else x
    expected = stepped(scheduler, network, own)
    torch.testing.assert_close(chain.sample(network, x)[0], expected, rtol=1e-4, atol=1e-4)


def test_coefficients_of_noise_schedules_keep_their_bits() -> None:
    """DDIM's formulas written out, to the last bit: chains of older samplers come back."""
    bars = [*ALPHAS[[801, 601, 401, 201]].tolist(), ALPHAS[0].item()]
    chain = ReversibleSampler(ALPHAS, [801, 601, 401, 201])._chain
    for i, (now, prev) in enumerate(pairwise(bars)):
        a = math.sqrt(prev / now)
        b = math.sqrt(1 - prev) - a * math.sqrt(1 - now)
        unit = 2.0**-26
        for _ in range(i):
            unit *= 0.93
        grid = (math.sqrt((1 - prev) / prev) - math.sqrt((1 - now) / now)) / unit
        for link, fed_at in zip(chain.links[2 * i : 2 * i + 2], (now, prev)):
            assert (link.keep, link.eps, link.other) == (a, b, 0.0)
            assert (link.grid_eps, link.scale) == (grid, math.sqrt(fed_at) * unit)
    links = ReversibleSampler(ALPHAS, [801, 601, 401, 201], method="bdia", exact=False)._chain.links
    for link, after, now, prev in zip(links, bars, bars[1:], bars[2:]):
        onward, back = math.sqrt(prev / now), math.sqrt(after / now)
        eps = math.sqrt(1 - prev) - onward * math.sqrt(1 - now)
        eps -= math.sqrt(1 - after) - back * math.sqrt(1 - now)
        assert (link.keep, link.other, link.eps) == (1.0, onward - back, eps)


def flow(**changes: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(flows.scheduler(flows.levels(4))), **changes})


def diffusion(**changes: object) -> SimpleNamespace:
    timesteps = torch.tensor([3, 2, 1])
    good = {"alphas_cumprod": torch.tensor([0.9, 0.8, 0.7, 0.6]), "timesteps": timesteps}
    return SimpleNamespace(**{**good, "num_inference_steps": 3, **changes})


NEITHER = (
    "scheduler must have timesteps, and alphas_cumprod, or a flow's sigmas (with scale_noise), got"
)
UNSET = "scheduler must know its steps, by set_timesteps, got SimpleNamespace without them"
REFUSALS = [  # scheduler, options, error, message
    (None, {}, TypeError, NEITHER + " NoneType"),
    (flow(timesteps=None), {}, TypeError, NEITHER + " SimpleNamespace"),
    (diffusion(alphas_cumprod=None), {}, TypeError, NEITHER),
    (flow(num_inference_steps=None), {}, ValueError, UNSET),
    (diffusion(num_inference_steps=None), {}, ValueError, UNSET),
    (
        flow(order=2),
        {},
        ValueError,
        "scheduler must have one timestep a step, got SimpleNamespace, which has 2",
    ),
    (
        flow(sigmas=torch.tensor([1.0, 0.5, 0.25, 0.1])),
        {},
        ValueError,
        "scheduler's sigmas must be one more than the 4 timesteps, got 4",
    ),
    (
        flow(sigmas=[1.0, 0.5, 0.6, 0.1, 0.0]),
        {},
        ValueError,
        "scheduler's sigmas must fall, or rise, all along, got [1.0, 0.5, 0.6, 0.1, 0.0]",
    ),
    (
        flow(sigmas=[80.0, 3.0, 2.0, 1.0, 0.0]),
        {},
        ValueError,
        "scheduler's sigmas must be in [0, 1], got 80.0",
    ),
    (
        flow(sigmas=[1.0, math.nan, 0.3, 0.1, 0.0]),
        {},
        ValueError,
        "scheduler's sigmas must be finite, got nan",
    ),
    (
        flow(sigmas=torch.ones(5, 1)),
        {},
        ValueError,
        "scheduler's sigmas must be one-dimensional, got (5, 1)",
    ),
    (
        flow(sigmas=0.5),
        {},
        TypeError,
        "scheduler's sigmas must be a tensor or a sequence, got float",
    ),
    (
        flow(sigmas=[0.0], timesteps=[]),
        {},
        ValueError,
        "scheduler's timesteps must have at least one element, got none",
    ),
    (
        flow(sigmas=[1.0, 0.5, 0.5, 0.1, 0.0]),
        {"method": "belm", "exact": False},
        ValueError,
        "must fall at every step, the last one included, for method='belm', got 0.5 after 0.5 at",
    ),
    (
        flow(),
        {"mix": 0.01},
        ValueError,
        "timesteps must be at most 3 with mix=0.01 and exact=True, or mix at least 0.016",
    ),
    (flow(), {"method": "bdia", "gamma": 0.5}, ValueError, "gamma must be 1 for exact=True, got"),
    (
        flow(),
        {"method": "ddim"},
        ValueError,
        "method must be one of edict, bdia, belm, euler, got 'ddim'",
    ),
    (
        diffusion(),
        {"method": "euler"},
        ValueError,
        "method must be one of edict, bdia, belm, ddim, got 'euler'",
    ),
    (
        diffusion(timesteps=torch.tensor([1, 2, 3])),
        {},
        ValueError,
        "scheduler's timesteps must descend to 0 or above, got [1, 2, 3]",
    ),
    (
        diffusion(sigmas=[1.0, 2.0, 0.5, 0.0]),
        {},
        ValueError,
        "scheduler's sigmas must not rise, got [1.0, 2.0, 0.5, 0.0]",
    ),
    (
        diffusion(sigmas=[1e30, 2.0, 0.5, 0.0]),
        {},
        ValueError,
        "scheduler's sigmas must be smaller for exact=True, got 1e+30",
    ),
]


@pytest.mark.parametrize(
    ("scheduler", "options", "error", "message"), REFUSALS, ids=range(len(REFUSALS))
)
def test_refusals(scheduler: object, options: dict, error: type[Exception], message: str) -> None:
    for good in (flow(), diffusion()):
        ReversibleSampler.from_scheduler(good)
    refused(error, message, ReversibleSampler.from_scheduler, scheduler, **options)


def test_schedulers_of_other_kinds_are_refused() -> None:
    scheduler = made("FlowMatchHeunDiscreteScheduler")
    refused(ValueError, "have one timestep a step", ReversibleSampler.from_scheduler, scheduler)
    scheduler = made("DPMSolverMultistepScheduler", prediction_type="flow_prediction")
    message = "scheduler must use_flow_sigmas for flow_prediction, got DPMSolverMultistepScheduler"
    refused(ValueError, message, ReversibleSampler.from_scheduler, scheduler)
    scheduler = made("MiniMaxH3Scheduler")  # whose network points to the data
    message = "have timesteps that fall as its sigmas do, got MiniMaxH3Scheduler, whose go from 0 "
    refused(ValueError, message, ReversibleSampler.from_scheduler, scheduler)
    scheduler = made("DPMSolverMultistepScheduler", use_flow_sigmas=True)
    message = "have a prediction_type of flow_prediction on flow sigmas, got DPM"
    refused(ValueError, message, ReversibleSampler.from_scheduler, scheduler)
    scheduler = made("EDMEulerScheduler")
    refused(TypeError, NEITHER, ReversibleSampler.from_scheduler, scheduler)
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler()
    refused(ValueError, "know its steps", ReversibleSampler.from_scheduler, scheduler)


def test_euler_is_for_sampling_alone() -> None:
    chain, x = flows.sampler(4, method="euler"), torch.randn(3)
    message = "method must be edict, bdia or belm for invert, got 'euler'"
    refused(ValueError, message, chain.invert, torch.sin, x)
    refused(
        ValueError,
        "y must be None for method='euler', got a tensor",
        chain.sample,
        lambda x, t: x,
        x,
        x,
    )
