"""Schedules, small networks and a plain implementation of the reversible samplers, for the tests of
chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dense_attn import ReversibleSampler

BETAS = (
    torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
)  # "scaled_linear", Stable Diffusion's
ALPHAS = (1 - BETAS).cumprod(0)
Pair = tuple[Tensor, Tensor]


def timesteps(num_steps: int) -> list[int]:
    """Evenly spaced and descending, the last one 1, as Stable Diffusion has them (0 for 1000
    steps).
    """
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
    network: Callable, steps: Sequence[int], x: Tensor, y: Tensor | None = None, *, method: str, mix: float = 0.93,
    gamma: float = 1.0, alternate: bool = True,
) -> Pair:  # fmt: skip
    """`sample` as the formulas of the papers have it, in plain PyTorch in the dtype of x;
    differentiable.
    """
    bars = [*ALPHAS[list(steps)].tolist(), ALPHAS[0].item()]
    if method == "edict":
        return _edict(network, steps, bars, x, x if y is None else y, mix, alternate)
    y = _moved(x, network(x, steps[0]), bars[0], bars[1]) if y is None else y
    if method == "ddim":
        for t, now, prev in zip(steps, bars, bars[1:]):
            x = _moved(x, network(x, t), now, prev)
        return x, x
    before, latent = x, y
    for i in range(1, len(steps)):
        eps = network(latent, steps[i])
        if method == "bdia":
            onward, back = (
                _moved(latent, eps, bars[i], bars[i + 1]),
                _moved(latent, eps, bars[i], bars[i - 1]),
            )
            before, latent = latent, gamma * before - gamma * back + onward
        else:
            root = [bar**0.5 for bar in bars]
            sigma = [(1 / bar - 1) ** 0.5 for bar in bars]
            h, h_before = sigma[i] - sigma[i + 1], sigma[i - 1] - sigma[i]
            z = (h / h_before) ** 2 * before / root[i - 1] + (
                1 - (h / h_before) ** 2
            ) * latent / root[i]
            before, latent = latent, (z - h * (h + h_before) / h_before * eps) * root[i + 1]
    return latent, before


def _edict(
    network: Callable,
    steps: Sequence[int],
    bars: list[float],
    x: Tensor,
    y: Tensor,
    mix: float,
    alternate: bool,
) -> Pair:
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
