"""A chain small enough to be written out, in float64: network, sampler, decoder, loss, noise."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense_attn import ReversibleSampler

ALPHAS = torch.linspace(0.999, 0.05, 1000, dtype=torch.float64)
TIMESTEPS = [750, 500, 250]
MIX = 0.93


class Network(nn.Module):
    """A convolution that knows the time."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)

    def forward(self, x: Tensor, t: int) -> Tensor:
        return torch.tanh(self.convolution(x.double()) * (1 + t / 1000)).to(x.dtype)


def sampler(method: str = "edict", **options: object) -> ReversibleSampler:
    options = {"exact": False, "dtype": torch.float64, "mix": MIX, "backend": "reference"} | options
    return ReversibleSampler(ALPHAS, TIMESTEPS, method=method, **options)


def decode(x: Tensor) -> Tensor:
    return torch.tanh(F.interpolate(x, scale_factor=2, mode="bilinear"))


def loss(image: Tensor) -> Tensor:
    return 4 * (image - 0.5).square().mean()


def latents(batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, 8, 8, dtype=dtype)
