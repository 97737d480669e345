"""Rectified flows for the tests of reversible: schedules, formulas written out, a field of known
velocity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace

import torch
from chains import Pair
from torch import Tensor

from dense_attn import ReversibleSampler


def levels(num_steps: int, shift: float = 1.0) -> list[float]:
    """Sigmas as FlowMatchEulerDiscreteScheduler has them, the last 0."""
    even = torch.linspace(1, 1e-3, num_steps, dtype=torch.float64)
    return [*(shift * even / (1 + (shift - 1) * even)).float().tolist(), 0.0]


def scheduler(sigmas: Sequence[float]) -> SimpleNamespace:
    """An object that says of itself what a scheduler of flows says."""
    sigmas = torch.tensor(sigmas, dtype=torch.float64)
    return SimpleNamespace(
        sigmas=sigmas,
        timesteps=1000 * sigmas[:-1],
        num_inference_steps=len(sigmas) - 1,
        scale_noise=None,
    )


def sampler(num_steps: int, shift: float = 1.0, **options: object) -> ReversibleSampler:
    return ReversibleSampler.from_scheduler(scheduler(levels(num_steps, shift)), **options)


def plain(
    network: Callable,
    sigmas: Sequence[float],
    x: Tensor,
    y: Tensor | None = None,
    *,
    method: str,
    mix: float = 0.93,
    gamma: float = 1.0,
    alternate: bool = True,
) -> Pair:
    """`sample` of a flow as its formulas have it, in plain PyTorch in x's dtype; differentiable."""
    times = [1000 * sigma for sigma in sigmas]
    if method == "edict":
        return _edict(network, sigmas, x, x if y is None else y, mix, alternate)
    y = x + (sigmas[1] - sigmas[0]) * network(x, times[0]) if y is None else y
    before, latent = x, y
    for i in range(1, len(sigmas) - 1):
        velocity = network(latent, times[i])
        onward = latent + (sigmas[i + 1] - sigmas[i]) * velocity
        if method == "euler":
            before, latent = latent, onward
        elif method == "bdia":
            back = latent + (sigmas[i - 1] - sigmas[i]) * velocity
            before, latent = latent, gamma * before - gamma * back + onward
        else:
            h, h_before = sigmas[i] - sigmas[i + 1], sigmas[i - 1] - sigmas[i]
            share = (h / h_before) ** 2
            kept = share * before + (1 - share) * latent
            before, latent = latent, kept - h * (h + h_before) / h_before * velocity
    return (latent, latent) if method == "euler" else (latent, before)


def _edict(
    network: Callable, sigmas: Sequence[float], x: Tensor, y: Tensor, mix: float, alternate: bool
) -> Pair:
    for i in range(len(sigmas) - 1):
        step, t = sigmas[i + 1] - sigmas[i], 1000 * sigmas[i]
        if alternate and i % 2:
            y = y + step * network(x, t)
            x = x + step * network(y, t)
        else:
            x = x + step * network(y, t)
            y = y + step * network(x, t)
        x = mix * x + (1 - mix) * y
        y = mix * y + (1 - mix) * x
    return x, y


def toy_velocity(x: Tensor, t: Tensor) -> Tensor:
    """noise - data, as x has it on average: the data are 16 blurred points of 8 dimensions."""
    sigma, blur = float(t) / 1000, 0.1
    points = torch.randn(16, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    variance = ((1 - sigma) * blur) ** 2 + sigma**2
    apart = x.double()[:, None] - (1 - sigma) * points  # [B, 16, 8]
    shares = torch.softmax(apart.square().sum(2) / (-2 * variance), 1)[..., None]
    data = points + (1 - sigma) * blur**2 / variance * apart
    return (shares * (sigma / variance * apart - data)).sum(1).to(x.dtype)


def toy_noise() -> Tensor:
    return torch.randn(200, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


@cache
def _sampled(method: str, calls: int, shift: float) -> Tensor:
    """200 images of the toy field."""
    steps = calls // 2 if method == "edict" else calls
    how = {"method": method, "dtype": torch.float64, "backend": "reference"}
    return sampler(steps, shift, **how).sample(toy_velocity, toy_noise())[0]


def from_euler(method: str, calls: int, shift: float, calls_of_euler: int) -> float:
    """How far a method's images of the toy field are from Euler's, as a share of their length."""
    image, other = _sampled(method, calls, shift), _sampled("euler", calls_of_euler, shift)
    return ((image - other).norm(dim=1) / other.norm(dim=1)).mean().item()
