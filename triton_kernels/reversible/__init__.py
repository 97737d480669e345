"""Reversible steps: arithmetic on every element of dense memory, with the CPU's very roundings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dense_attn.triton_kernels.reversible.floats import (
    ddim_step_kernel,
    edict_kernel,
    leapfrog_step_kernel,
)
from dense_attn.triton_kernels.reversible.grid import exact_edict_kernel, exact_leapfrog_kernel

BLOCK = 1024  # 8 elements a thread: loads of 16 bytes in every dtype, at most 64 registers
# No product melts into a sum: every step rounds as on the CPU, so that either device undoes the
# other's.
LAUNCH = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}


def ddim_step(
    x: Tensor, eps: Tensor, eps_uncond: Tensor | None, a: float, b: float, guidance_scale: float
) -> Tensor:
    """Launches `reference.ddim_step`."""
    out = torch.empty_like(x)
    _launch(ddim_step_kernel, (x, eps, eps_uncond, out), (a, b, guidance_scale), WIDE=_wide(x))
    return out


def leapfrog_step(
    far: Tensor, near: Tensor, eps: Tensor, c_far: float, c_near: float, c_eps: float
) -> Tensor:
    """Launches `reference.leapfrog_step`."""
    out = torch.empty_like(far)
    _launch(leapfrog_step_kernel, (far, near, eps, out), (c_far, c_near, c_eps), WIDE=_wide(far))
    return out


def edict_mix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    """Launches `reference.edict_mix`."""
    return _edict(x, y, eps, a, b, mix, couple_x, inverse=False)


def edict_unmix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    """Launches `reference.edict_unmix`."""
    return _edict(x, y, eps, a, b, mix, couple_x, inverse=True)


def exact_couple(
    z: Tensor, eps: Tensor, step: float, to_latent: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Launches `reference.exact_couple`; what leaves the grid becomes OFF_GRID, its latent NaN."""
    return _exact_leapfrog(z, None, eps, 0.0, step, to_latent, dtype)


def exact_leapfrog(
    far: Tensor,
    near: Tensor,
    eps: Tensor,
    c_near: float,
    c_eps: float,
    to_latent: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Launches `reference.exact_leapfrog`; what leaves the grid is OFF_GRID, its latent NaN."""
    return _exact_leapfrog(far, near, eps, c_near, c_eps, to_latent, dtype)


def exact_mix(
    x: Tensor,
    y: Tensor,
    eps: Tensor | None,
    step: float,
    mix: float,
    couple_x: bool,
    to_latent: float,
    latent_x: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `reference.exact_mix`; what leaves the grid becomes OFF_GRID, its latent NaN."""
    return _exact_edict(x, y, eps, step, mix, couple_x, to_latent, latent_x, dtype, inverse=False)


def exact_unmix(
    x: Tensor,
    y: Tensor,
    eps: Tensor | None,
    step: float,
    mix: float,
    couple_x: bool,
    to_latent: float,
    latent_x: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches `reference.exact_unmix`; what leaves the grid becomes OFF_GRID, its latent NaN."""
    return _exact_edict(x, y, eps, step, mix, couple_x, to_latent, latent_x, dtype, inverse=True)


def _edict(
    x: Tensor,
    y: Tensor,
    eps: Tensor | None,
    a: float,
    b: float,
    mix: float,
    couple_x: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    x_out, y_out = torch.empty_like(x), torch.empty_like(y)
    flags = {"COUPLE_X": couple_x, "INVERSE": inverse, "WIDE": _wide(x)}
    _launch(edict_kernel, (x, y, eps, x_out, y_out), (a, b, mix, 1 - mix), **flags)
    return x_out, y_out


def _exact_leapfrog(
    far: Tensor,
    near: Tensor | None,
    eps: Tensor,
    c_near: float,
    c_eps: float,
    to_latent: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    z, latent = torch.empty_like(far), torch.empty_like(far, dtype=dtype)
    _launch(exact_leapfrog_kernel, (far, near, eps, z, latent), (c_near, c_eps, to_latent))
    return z, latent


def _exact_edict(
    x: Tensor,
    y: Tensor,
    eps: Tensor | None,
    step: float,
    mix: float,
    couple_x: bool,
    to_latent: float,
    latent_x: bool,
    dtype: torch.dtype,
    inverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x_out, y_out = torch.empty_like(x), torch.empty_like(y)
    latent = torch.empty_like(x, dtype=dtype)
    tensors = (x, y, eps, x_out, y_out, latent)
    numbers = (step, (1 - mix) / mix, 1 - mix, to_latent)
    flags = {"COUPLE_X": couple_x, "LATENT_X": latent_x, "INVERSE": inverse}
    _launch(exact_edict_kernel, tensors, numbers, **flags)
    return x_out, y_out, latent


def _wide(x: Tensor) -> tl.dtype:
    """The dtype that a kernel of floats computes in."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _launch(
    kernel: triton.JITFunction, tensors: tuple, numbers: tuple[float, ...], **options: object
) -> None:
    if (numel := tensors[0].numel()) > 0:
        kernel[(-(-numel // BLOCK),)](*tensors, numel, *numbers, **options, **LAUNCH)
