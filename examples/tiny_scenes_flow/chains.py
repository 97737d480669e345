"""The flow from noise to latents and back: Euler's steps, second-order ones, exact pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn import ReversibleSampler

from .model import OneEncoder

Velocity = Callable[[Tensor, Tensor], Tensor]  # of latents at a time of 1000
Ends = tuple[Tensor, Tensor]  # the pair of a chain; twice the same where it has none


class Network:
    """The velocity of latents under prompts, one for each of them."""

    def __init__(self, pipe: OneEncoder, prompts: Sequence[str], guidance: float = 1.0) -> None:
        self.pipe, self.guidance = pipe, guidance
        guided = guidance != 1
        texts = list(prompts)
        with torch.no_grad():
            text, negative, pooled, negative_pooled = pipe.encode_prompt(
                texts, texts, texts, do_classifier_free_guidance=guided
            )
        self.text = torch.cat([negative, text]) if guided else text
        self.pooled = torch.cat([negative_pooled, pooled]) if guided else pooled

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """The guided velocity, noise - data."""
        batch = torch.cat([x, x]) if self.guidance != 1 else x
        times = t.to(batch.dtype).expand(len(batch))
        found = self.pipe.transformer(batch, self.text, self.pooled, times, return_dict=False)[0]
        if self.guidance == 1:
            return found
        uncond, text = found.chunk(2)
        return uncond + self.guidance * (text - uncond)


class Way(NamedTuple):
    """A method of walking the flow; `there` is from noise to latents, `back` from latents."""

    calls: int  # of the network in a step
    there: Callable[[Velocity, Ends, list[float]], Ends]
    back: Callable[[Velocity, Ends, list[float]], Ends]


def sigmas(steps: int) -> list[float]:
    """The schedule from noise, 1, to data, 0."""
    return [1 - i / steps for i in range(steps + 1)]


def euler(network: Velocity, x: Tensor, levels: Sequence[float]) -> Tensor:
    """`x + (sigma' - sigma)*v(x, sigma)` along the levels, in either direction."""
    for now, then in pairwise(levels):
        x = x + (then - now) * network(x, _time(now))
    return x


def second_order(network: Velocity, x: Tensor, levels: Sequence[float]) -> Tensor:
    """RF-Solver's step along the levels: Taylor's second term by a difference at half a step.

    `x + h*v + h^2/2 * (v(x + h/2*v, sigma + h/2) - v) / (h/2)` with `h = sigma' - sigma`. Source:
    Wang et al., Taming Rectified Flow for Inversion and Editing, 2024 (arXiv 2411.04746).
    """
    for now, then in pairwise(levels):
        step = then - now
        velocity = network(x, _time(now))
        middle = network(x + step / 2 * velocity, _time(now + step / 2))
        slope = (middle - velocity) / (step / 2)
        x = x + step * velocity + step**2 / 2 * slope
    return x


def _time(sigma: float) -> Tensor:
    return torch.tensor(1000 * sigma, dtype=torch.float32, device="cpu")


def _plain(calls: int, walk: Callable[[Velocity, Tensor, Sequence[float]], Tensor]) -> Way:
    """A method that is inverted by walking backwards."""

    def there(network: Velocity, ends: Ends, levels: list[float]) -> Ends:
        return (walk(network, ends[0], levels),) * 2

    def back(network: Velocity, ends: Ends, levels: list[float]) -> Ends:
        return (walk(network, ends[0], levels[::-1]),) * 2

    return Way(calls, there, back)


def _exact(calls: int, method: str) -> Way:
    """A method that is undone bit for bit."""

    def there(network: Velocity, ends: Ends, levels: list[float]) -> Ends:
        return sampler(levels, method).sample(network, *ends)

    def back(network: Velocity, ends: Ends, levels: list[float]) -> Ends:
        return sampler(levels, method).invert(network, *ends)

    return Way(calls, there, back)


def sampler(levels: list[float], method: str, exact: bool = True) -> ReversibleSampler:
    """The library's chain on a schedule."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=levels[:-1])
    return ReversibleSampler.from_scheduler(scheduler, method=method, exact=exact)


WAYS = {
    "Euler": _plain(1, euler),
    "RF-Solver": _plain(2, second_order),
    "exact leapfrog": _exact(1, "bdia"),
    "exact EDICT": _exact(2, "edict"),
}
