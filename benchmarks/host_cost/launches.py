"""A few small launches of every Triton kernel, for checkers of memory and races:
`compute-sanitizer ... launches`.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys

import torch

from dense_attn import (
    ReversibleSampler,
    _command,
    ddim_step,
    layout_attention,
    percentile_mask,
    sega_guidance,
    triton_kernels,
)
from dense_attn._backends import triton

DEVICE = triton.DEVICE


class Watched:
    """A kernel that notes in `idle` that it is launched."""

    def __init__(self, kernel: object, name: str, idle: set[str]) -> None:
        self._kernel, self._name, self._idle = kernel, name, idle

    def __getitem__(self, grid: tuple[int, ...]) -> object:
        self._idle.discard(self._name)
        return self._kernel[grid]

    def __getattr__(self, name: str) -> object:
        return getattr(self._kernel, name)


def watch() -> set[str]:
    """The names of all kernels, which leave the set when they are launched."""
    idle, watched = set(), {}
    for found in pkgutil.walk_packages(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        module = importlib.import_module(found.name)
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                idle.add(name)
                setattr(module, name, watched.setdefault(name, Watched(kernel, name, idle)))
    return idle


def attention(modulation: str, seqlen_k: int, head_dim: int, dtype: torch.dtype) -> None:
    """Forward and backward, in one tile of keys or in two phases."""
    q, k, v = (
        torch.randn(1, 2, n, head_dim, dtype=dtype, device=DEVICE).requires_grad_()
        for n in (150, seqlen_k, seqlen_k)
    )
    words = [
        1 << (torch.arange(n, device=DEVICE, dtype=torch.int32) * 3 // n) for n in (150, seqlen_k)
    ]
    orders = {
        "q_order": words[0].argsort(stable=True).int(),
        "k_order": words[1].argsort(stable=True).int(),
    }
    out = layout_attention(q, k, v, *words, 0.6, modulation=modulation, backend="triton", **orders)
    out.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))


def guidance(size: int) -> None:
    """A step of two concepts and a mask, of channels that fit one program or do not."""
    uncond, text, momentum = torch.randn(3, 1, 2, size, device=DEVICE)
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    numbers |= {"edit_guidance_scale": 5.0, "edit_threshold": 0.9, "edit_weights": 1.0}
    flags = {"warm": True, "enabled": True, "reverse": False, "backend": "triton"}
    edits = torch.randn(2, 1, 2, size, device=DEVICE)
    for sum_channels in (False, True):
        eps, _ = sega_guidance(
            uncond, text, edits, momentum, **numbers, **flags, sum_channels=sum_channels
        )
        assert eps.isfinite().all()
    masked, _ = percentile_mask(edits.flatten(0, 2), 0.9, dim=-1, backend="triton")
    assert masked.isfinite().all()


def step() -> None:
    """One of DDIM, with guidance."""
    x, eps, uncond = torch.randn(3, 1, 4, 9, 7, device=DEVICE)
    assert (
        ddim_step(x, eps, 0.5, 0.6, eps_uncond=uncond, guidance_scale=7.5, backend="triton")
        .isfinite()
        .all()
    )


def chain(method: str, exact: bool) -> None:
    """Three steps there and back."""
    alphas = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    sampler = ReversibleSampler(
        alphas, [900, 600, 300], method=method, exact=exact, backend="triton"
    )
    noise = torch.randn(1, 4, 9, 7, device=DEVICE)
    found = sampler.invert(_network, *sampler.sample(_network, noise))
    assert all(x.isfinite().all() for x in found)


def _network(x: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(x)


def main() -> int:
    """Every kernel once or twice; 1 if one was left out."""
    idle = watch()
    for modulation in ("range", "mask"):
        for seqlen_k, head_dim in ((77, 40), (200, 80)):
            attention(modulation, seqlen_k, head_dim, torch.float16)
    attention("max", 200, 128, torch.float32)
    for size in (1000, 33_000):
        guidance(size)
    step()
    for method in ("edict", "bdia"):
        for exact in (True, False):
            chain(method, exact)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"never launched: {', '.join(sorted(idle))}" if idle else "every kernel was launched")
    return 1 if idle else 0


if __name__ == "__main__":
    sys.exit(_command.run("launches", main))
