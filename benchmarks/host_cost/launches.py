"""A few small launches of every kernel of GPUs, for a checker of memory or races."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from functools import partial
from types import ModuleType
from unittest.mock import patch

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
from dense_attn._backends import cuda, table, triton
from dense_attn.triton_kernels import configs

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


def kernels() -> dict[str, list[ModuleType]]:
    """The modules in which each kernel has its name, its own and those that launch it."""
    found: dict[str, list[ModuleType]] = {}
    for place in pkgutil.walk_packages(triton_kernels.__path__, f"{triton_kernels.__name__}."):
        module = importlib.import_module(place.name)
        for name in vars(module):
            if name.endswith("_kernel"):
                found.setdefault(name, []).append(module)
    return found


def watch() -> set[str]:
    """The names of all kernels, which leave the set when they are launched."""
    idle = set(kernels())
    for name, modules in kernels().items():
        watched = Watched(getattr(modules[0], name), name, idle)
        for module in modules:
            setattr(module, name, watched)
    return idle


def check(*results: torch.Tensor) -> None:
    """Results are finite."""
    assert all(x.isfinite().all() for x in results)


def attention(
    modulation: str, seqlen_k: int, head_dim: int, dtype: torch.dtype, backend: str = "triton"
) -> None:
    """Forward and backward, in one tile of keys or in two phases."""
    q, k, v = (
        torch.randn(1, 2, n, head_dim, dtype=dtype, device=DEVICE).requires_grad_()
        for n in (150, seqlen_k, seqlen_k)
    )
    tokens = (torch.arange(n, device=DEVICE, dtype=torch.int32) for n in (150, seqlen_k))
    words = [1 << (places * 3 // len(places)) for places in tokens]
    q_order, k_order = (x.argsort(stable=True).int() for x in words)
    how = {"q_order": q_order, "k_order": k_order, "modulation": modulation, "backend": backend}
    out = layout_attention(q, k, v, *words, 0.6, **how)
    with patch.object(cuda, "gradient_of_attention", lambda q: backend):  # its own kernels
        out.float().square().sum().backward()
    check(q.grad, k.grad, v.grad)


def packed() -> None:
    """Many keys, and no processor that is left idle: a call for specialised warps."""
    with patch.object(configs, "processors", return_value=1):
        attention("range", configs.PACKED_KEYS + 6, 40, torch.float16)


def guidance(size: int, backend: str = "triton") -> None:
    """A step of two concepts and a mask, of channels that fit one program or do not."""
    uncond, text, momentum = torch.randn(3, 1, 2, size, device=DEVICE)
    options = {"guidance_scale": 7.5, "edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    options |= {"edit_guidance_scale": 5.0, "edit_threshold": 0.9, "edit_weights": 1.0}
    options |= {"warm": True, "enabled": True, "reverse": False, "backend": backend}
    edits = torch.randn(2, 1, 2, size, device=DEVICE)
    for together in (False, True):
        eps, _ = sega_guidance(uncond, text, edits, momentum, **options, sum_channels=together)
        check(eps)
    masked, _ = percentile_mask(edits.flatten(0, 2), 0.9, dim=-1, backend=backend)
    check(masked)


def step(backend: str = "triton") -> None:
    """One step of DDIM, with guidance."""
    x, eps, uncond = torch.randn(3, 1, 4, 9, 7, device=DEVICE)
    options = {"eps_uncond": uncond, "guidance_scale": 7.5, "backend": backend}
    check(ddim_step(x, eps, 0.5, 0.6, **options))


def chain(method: str, exact: bool, backend: str = "triton") -> None:
    """Three steps there and back."""
    alphas = torch.linspace(0.999, 0.01, 1000, dtype=torch.float64)
    how = {"method": method, "exact": exact, "backend": backend}
    sampler = ReversibleSampler(alphas, [900, 600, 300], **how)
    noise = torch.randn(1, 4, 9, 7, device=DEVICE)
    found = sampler.invert(_network, *sampler.sample(_network, noise))
    check(*found)


def _network(x: torch.Tensor, t: int) -> torch.Tensor:
    return torch.tanh(x)


ATTENTION = (
    *(
        partial(attention, modulation, seqlen_k, head_dim, torch.float16)
        for modulation in ("range", "mask")
        for seqlen_k, head_dim in ((77, 40), (200, 80))
    ),
    partial(attention, "max", 200, 128, torch.float32),
)
# The kernels of specialised warps, where there are any.
SPECIALISED = {"layout_attention_specialised_fwd_kernel", "packed_rows_kernel"}
GUIDANCE = tuple(partial(guidance, size) for size in (1000, 33_000))
STEPS = (
    step,
    *(partial(chain, method, exact) for method in ("edict", "bdia") for exact in (True, False)),
)
BY_CUDA = tuple(partial(part, backend="cuda") for part in (*ATTENTION[:-1], *GUIDANCE, *STEPS))


def main() -> int:
    """Every kernel once or twice; 1 if one of Triton's was left out."""
    idle = watch()
    parts = ATTENTION
    if configs.architecture(torch.device(DEVICE)) in configs.SPECIALISED:
        parts += (packed,)
    else:
        idle -= SPECIALISED
    without = table.unavailable("cuda", "layout_attention")
    for part in (*parts, *GUIDANCE, *STEPS, *(() if without else BY_CUDA)):
        part()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"without CUDA's: {without}" if without else "CUDA's ops were launched")
    print(f"never launched: {', '.join(sorted(idle))}" if idle else "every kernel was launched")
    return 1 if idle else 0


if __name__ == "__main__":
    sys.exit(_command.run("launches", main))
