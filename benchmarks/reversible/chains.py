"""The schedule of Stable Diffusion, and EDICT and DDIM along it in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dense_attn import reference

EpsFn = Callable[[Tensor, int], Tensor]
TRAIN_STEPS = 1000


def alphas_cumprod() -> Tensor:
    """Stable Diffusion's "scaled linear" schedule, float64 [1000]."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


def timesteps(steps: int) -> list[int]:
    """Even timesteps from the noise to the image, one off the image's end where there is room."""
    stride = TRAIN_STEPS // steps
    return [stride * step + (stride > 1) for step in reversed(range(steps))]


def final_alpha_cumprod(steps: int) -> float:
    """The end of the last step: timestep 0, or, if it starts there, the image without noise."""
    return alphas_cumprod()[0].item() if timesteps(steps)[-1] > 0 else 1.0


@dataclass(frozen=True)
class DdimStep:
    """One step of a schedule: x <- a*x + b*eps takes x from timestep t to the next."""

    index: int
    t: int
    a: float
    b: float


def schedule(steps: int) -> list[DdimStep]:
    """The steps from noise to image."""
    alphas, times = alphas_cumprod().tolist(), timesteps(steps)
    here = [*(alphas[t] for t in times), final_alpha_cumprod(steps)]
    walk = []
    for index, (t, (now, after)) in enumerate(zip(times, pairwise(here))):
        a = (after / now) ** 0.5
        walk.append(DdimStep(index, t, a, (1 - after) ** 0.5 - a * (1 - now) ** 0.5))
    return walk


def ddim(eps_fn: EpsFn, x: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Plain DDIM: the image, twice."""
    for step in schedule(steps):
        x = step.a * x + step.b * eps_fn(x, step.t)
    return x, x


def edict(
    eps_fn: EpsFn, x: Tensor, steps: int, mix: float, recompute: bool = False
) -> tuple[Tensor, Tensor]:
    """EDICT from the noise x to a pair of images; `recompute` keeps each step's pair alone."""
    y = x
    for step in schedule(steps):
        if recompute:
            x, y = checkpoint(_edict_step, eps_fn, x, y, step, mix, use_reentrant=False)
        else:
            x, y = _edict_step(eps_fn, x, y, step, mix)
    return x, y


def _edict_step(
    eps_fn: EpsFn, x: Tensor, y: Tensor, step: DdimStep, mix: float
) -> tuple[Tensor, Tensor]:
    """Both couplings, x first in even steps, and the mix."""
    if step.index % 2 == 0:
        x = step.a * x + step.b * eps_fn(y, step.t)
        y = step.a * y + step.b * eps_fn(x, step.t)
    else:
        y = step.a * y + step.b * eps_fn(x, step.t)
        x = step.a * x + step.b * eps_fn(y, step.t)
    return reference.edict_mix(x, y, None, step.a, step.b, mix, True)
