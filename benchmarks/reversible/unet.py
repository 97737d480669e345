"""Networks to walk a chain with: a plain U-Net of a million parameters, and a convolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .chains import alphas_cumprod

_GROUPS, _FREQUENCIES = 8, 32


class SmallUNet(nn.Module):
    """An eps_fn of random weights: three resolutions, a residual block at each, down and up.

    To the network's output comes sqrt(1-alphas_cumprod[t])*x, the best guess for an image of white
    noise: a chain of random predictions alone would leave the range of latents.
    """

    def __init__(self, width: int = 32, channels: int = 4, seed: int = 0) -> None:
        super().__init__()
        wide, wider = 2 * width, 4 * width
        self.embed = nn.Sequential(nn.Linear(2 * _FREQUENCIES, wider), nn.SiLU())
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.down = nn.ModuleList((_Block(width, width, wider), _Block(wide, wide, wider)))
        self.shrink = nn.ModuleList((_conv(width, wide, 2), _conv(wide, wider, 2)))
        self.middle = nn.ModuleList((_Block(wider, wider, wider), _Block(wider, wider, wider)))
        self.up = nn.ModuleList(
            (_Block(wider + wide, wide, wider), _Block(wide + width, width, wider))
        )
        self.last = nn.Sequential(nn.GroupNorm(_GROUPS, width), nn.SiLU(), _conv(width, channels))
        self.register_buffer("noise_level", (1 - alphas_cumprod()).sqrt())
        generator = torch.Generator().manual_seed(seed)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=weight[0].numel() ** -0.5, generator=generator)
        self.requires_grad_(False)

    def forward(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The noise predicted in x [B, C, H, W] at timestep t."""
        angles = float(t) * torch.logspace(0, -4, _FREQUENCIES, dtype=x.dtype, device=x.device)
        time = self.embed(torch.cat((angles.sin(), angles.cos())))
        h, skips = self.first(x), []
        for block, shrink in zip(self.down, self.shrink):
            skips.append(block(h, time))
            h = shrink(skips[-1])
        for block in self.middle:
            h = block(h, time)
        for block in self.up:
            h = functional.interpolate(h, scale_factor=2.0)
            h = block(torch.cat((h, skips.pop()), 1), time)
        return self.noise_level[int(t)] * x + 0.1 * self.last(h)


class _Block(nn.Module):
    """Group norm, SiLU and convolution, twice, the time added in between, beside a skip."""

    def __init__(self, inner: int, outer: int, time: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList((nn.GroupNorm(_GROUPS, inner), nn.GroupNorm(_GROUPS, outer)))
        self.convs = nn.ModuleList((_conv(inner, outer), _conv(outer, outer)))
        self.time = nn.Linear(time, outer)
        self.skip = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.convs[0](functional.silu(self.norms[0](x))) + self.time(time)[:, None, None]
        return (self.skip(x) + self.convs[1](functional.silu(self.norms[1](h)))) * math.sqrt(0.5)


def _conv(inner: int, outer: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, 3, stride, padding=1)


class TinyNet:
    """An eps_fn of one convolution in x's dtype, which couples pixels with neighbours and time."""

    def __init__(self, channels: int = 4, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._weight = torch.randn(channels, channels, 3, 3, generator=generator) / 6
        self._noise_level = (1 - alphas_cumprod()).sqrt().tolist()

    def __call__(self, x: Tensor, t: Tensor | int) -> Tensor:
        """The noise predicted in x [B, C, H, W] at timestep t."""
        change = functional.conv2d(x, self._weight.to(x), padding=1).tanh()
        return self._noise_level[int(t)] * x + 0.1 * change
