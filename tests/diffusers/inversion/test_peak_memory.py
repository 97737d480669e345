"""The memory that gradients through a pipeline's chain take at their peak, as the system counts it.

A network's activations are many times its latents here, as they are in a real one: what a chain
kept of each step would show.
"""

from __future__ import annotations

from collections.abc import Callable

import flows
import pytest
import torch
from families.chained import call_of, noise, pipe_of
from torch import Tensor

from dense_attn._memory import peak_extra_bytes
from dense_attn.integrations.diffusers.inversion.rehearsed import Rehearsed
from dense_attn.integrations.diffusers.inversion.settings import Settings

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:eps_fn must be an nn.Module"),  # parameters get none
]
SIZES = {"wan": (384, 384, 5), "flux": (96, 96, None)}  # height, width, frames


def chain_of(name: str, steps: int) -> Rehearsed:
    *size, frames = SIZES[name]
    settings = Settings("a cat", "fog", 4.0, steps, {}, call_of(name), tuple(size), frames)
    return Rehearsed(pipe_of(name), settings, 1, noise())


def ours(chain: Rehearsed, x: Tensor) -> tuple[Tensor, Tensor]:
    return chain.sampler.sample(chain.eps, x)


def autograd(chain: Rehearsed, x: Tensor) -> tuple[Tensor, Tensor]:
    """Plain steps, of which all activations are kept."""
    times, sigmas = chain.sampler.timesteps, [one.u for one in chain.sampler.schedule.moments]

    def network(x: Tensor, t: float) -> Tensor:
        return chain.eps(x, min(times, key=lambda time: abs(time.item() - t)))

    return flows.plain(network, sigmas, x, method="edict")


def peak(name: str, steps: int, sample: Callable) -> int:
    """The bytes that a rehearsal, a chain and its gradient add."""

    def gradient() -> Tensor:
        chain = chain_of(name, steps)
        x = chain.latents.clone().requires_grad_()
        return torch.autograd.grad(sample(chain, x)[0].sum(), x)[0]

    extra, found = peak_extra_bytes(gradient)
    assert found.isfinite().all()
    return extra or pytest.skip("no peak of memory on this system")


@pytest.mark.full
@pytest.mark.parametrize("name", list(SIZES))
def test_fifty_steps_take_the_memory_of_five(name: str) -> None:
    """A pair of latents a step, which checkpoints keep, would add a third, and more on Wan."""
    peak(name, 1, ours)  # loads code
    few, many, kept = (peak(name, *how) for how in ((5, ours), (50, ours), (5, autograd)))
    assert many < 1.2 * few
    assert kept > 2 * many
