"""Schedules, networks, plain chains and the arguments of raw steps, for the tests of reversible."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import pytest
import raw
import torch
from torch import Tensor, nn

from dense_attn import ReversibleSampler, reference

# "scaled_linear", Stable Diffusion's
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
ALPHAS = (1 - BETAS).cumprod(0)
Pair = tuple[Tensor, Tensor]
ONE = (1, 4, 5, 6)  # one sample
METHODS = [
    ("edict", {}),
    ("edict", {"exact": False, "alternate": False, "mix": 0.8}),
    ("bdia", {}),
    ("bdia", {"exact": False, "gamma": 0.7}),
    ("belm", {"exact": False}),
    ("ddim", {}),  # takes no pair
]
INVERTIBLE = METHODS[:-1]
GRAMMAR = re.compile(r"[A-Za-z_' ]+ must .+, got .+", re.DOTALL)
LATENTS = ("x", "y", "far", "near", "z")
COUPLINGS = {"x": {"couple_x": True}, "y": {"couple_x": False}, "none": {"eps": None}}
STEPS = {  # what each step may be asked for: the op and what differs from `arguments`
    "ddim": ("ddim_step", {"eps_uncond": None}),
    "ddim-guided": ("ddim_step", {}),
    "leapfrog": ("leapfrog_step", {}),
    **{
        f"{op}-{which}": (op, change)
        for op in ("edict_mix", "edict_unmix")
        for which, change in COUPLINGS.items()
    },
}
EXACT_STEPS = {"couple": ("exact_couple", {}), "leapfrog": ("exact_leapfrog", {})}
EXACT_STEPS |= {
    f"{op}-{which}": (op, {**change, "latent_x": which == "y"})
    for op in ("exact_mix", "exact_unmix")
    for which, change in COUPLINGS.items()
}
EVERY_STEP = {**STEPS, **{f"exact-{name}": step for name, step in EXACT_STEPS.items()}}


def timesteps(num_steps: int) -> list[int]:
    """Evenly spaced, descending to 1 as Stable Diffusion has them (to 0 for 1000 steps)."""
    return [i * (1000 // num_steps) + (num_steps < 1000) for i in reversed(range(num_steps))]


class Network(nn.Module):
    """Two convolutions and a time embedding."""

    def __init__(
        self, channels: int = 4, width: int = 8, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, width, 3, padding=1, dtype=dtype)
        self.last = nn.Conv2d(width, channels, 3, padding=1, dtype=dtype)
        self.time = nn.Parameter(torch.randn(width, 1, 1, dtype=dtype))

    def forward(self, x: Tensor, t: int | Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x) + self.time * (t / 1000)))


def sampler(num_steps: int, **options: object) -> ReversibleSampler:
    """A sampler on Stable Diffusion's schedule."""
    return ReversibleSampler(ALPHAS, timesteps(num_steps), **options)


def plain(
    network: Callable,
    steps: Sequence[int],
    x: Tensor,
    y: Tensor | None = None,
    *,
    method: str,
    mix: float = 0.93,
    gamma: float = 1.0,
    alternate: bool = True,
) -> Pair:
    """`sample` as the papers' formulas have it, in plain PyTorch in x's dtype; differentiable."""
    bars = [*ALPHAS[list(steps)].tolist(), ALPHAS[0].item()]
    if method == "edict":
        return edict(network, steps, bars, x, x if y is None else y, mix, alternate)
    y = _moved(x, network(x, steps[0]), bars[0], bars[1]) if y is None else y
    if method == "ddim":
        for t, now, prev in zip(steps, bars, bars[1:]):
            x = _moved(x, network(x, t), now, prev)
        return x, x
    before, latent = x, y
    for i in range(1, len(steps)):
        eps = network(latent, steps[i])
        if method == "bdia":
            onward = _moved(latent, eps, bars[i], bars[i + 1])
            back = _moved(latent, eps, bars[i], bars[i - 1])
            before, latent = latent, gamma * before - gamma * back + onward
        else:
            root = [bar**0.5 for bar in bars]
            sigma = [(1 / bar - 1) ** 0.5 for bar in bars]
            h, h_before = sigma[i] - sigma[i + 1], sigma[i - 1] - sigma[i]
            share = (h / h_before) ** 2
            z = share * before / root[i - 1] + (1 - share) * latent / root[i]
            before, latent = latent, (z - h * (h + h_before) / h_before * eps) * root[i + 1]
    return latent, before


def edict(
    network: Callable,
    steps: Sequence[int],
    bars: list[float],
    x: Tensor,
    y: Tensor,
    mix: float = 0.93,
    alternate: bool = True,
) -> Pair:
    """EDICT's pair over the alpha bars of steps, and of where the last one goes."""
    for i, t in enumerate(steps):
        if alternate and i % 2:
            y = _moved(y, network(x, t), bars[i], bars[i + 1])
            x = _moved(x, network(y, t), bars[i], bars[i + 1])
        else:
            x = _moved(x, network(y, t), bars[i], bars[i + 1])
            y = _moved(y, network(x, t), bars[i], bars[i + 1])
        x = mix * x + (1 - mix) * y
        y = mix * y + (1 - mix) * x
    return x, y


def _moved(x: Tensor, eps: Tensor, now: float, then: float) -> Tensor:
    """DDIM: predict x_0, then noise it anew."""
    predicted = (x - (1 - now) ** 0.5 * eps) / now**0.5
    return then**0.5 * predicted + (1 - then) ** 0.5 * eps


def leaves(pair: bool, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [torch.randn(ONE, dtype=dtype, requires_grad=True) for _ in range(1 + pair)]


def weighted(latents: tuple[Tensor, Tensor], used: str) -> Tensor:
    """A loss that tells the two latents apart and uses one or both."""
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(2, *ONE, generator=generator, dtype=torch.float64)
    return sum(
        (w * x.double().sin()).sum() for w, x, name in zip(weights, latents, "xy") if name in used
    )


def refused(
    error: type[Exception], message: str, call: Callable, *arguments: object, **options: object
) -> None:
    with pytest.raises(error) as refusal:
        call(*arguments, **options)
    assert type(refusal.value) is error
    assert GRAMMAR.fullmatch(str(refusal.value)), refusal.value
    assert message in str(refusal.value)


def coordinates(shape: tuple[int, ...], bits: int) -> Tensor:
    """Integers of all magnitudes below 2^bits."""
    return torch.randint(-(2**bits), 2**bits, shape) >> torch.randint(0, bits, shape)


def arguments(
    shape: tuple[int, ...] = (2, 3, 5, 7),
    dtype: torch.dtype = torch.float32,
    eps_dtype: torch.dtype = torch.float32,
    **changes: object,
) -> raw.Arguments:
    """A call of any of the float ops that is right in every respect."""
    latents = {name: torch.randn(shape).to(dtype) for name in LATENTS}
    eps = {name: torch.randn(shape).to(eps_dtype) for name in ("eps", "eps_uncond")}
    numbers = {
        "a": 0.98,
        "b": 0.13,
        "guidance_scale": 7.5,
        "c_far": 1.1,
        "c_near": -0.4,
        "c_eps": 0.3,
        "mix": 0.93,
    }
    return {**latents, **eps, **numbers, "couple_x": True, **changes}


def exact_arguments(
    shape: tuple[int, ...] = (2, 3, 5, 7),
    dtype: torch.dtype = torch.float32,
    eps_dtype: torch.dtype = torch.float32,
    **changes: object,
) -> raw.Arguments:
    """A call of any of the ops on the grid that is right in every respect."""
    good = arguments(shape, eps_dtype=eps_dtype) | {
        name: coordinates(shape, 48) for name in LATENTS
    }
    numbers = {"step": 12345678.9, "c_eps": -3456789.1, "to_latent": 0.7**5 * 2.0**-46}
    return {**good, **numbers, "couple_x": True, "latent_x": True, "dtype": dtype, **changes}


def any_arguments(step: str) -> tuple[str, raw.Arguments]:
    op, changes = EVERY_STEP[step]
    return op, (exact_arguments if op.startswith("exact") else arguments)(**changes)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def kernel(op: str, given: raw.Arguments) -> tuple[Tensor, ...]:
    return as_tuple(raw.call(op, given))


def expected(op: str, given: raw.Arguments) -> tuple[Tensor, ...]:
    return as_tuple(
        getattr(reference, op)(**{name: given[name] for name in raw.argument_names(op)})
    )
