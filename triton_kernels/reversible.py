"""Reversible steps: arithmetic on every element of dense memory, with the CPU's very roundings."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # 8 elements a thread: loads of 16 bytes in every dtype, at most 64 registers
# No product melts into a sum: every step rounds as on the CPU, so that either device undoes the
# other's.
LAUNCH = {"BLOCK": BLOCK, "num_warps": 4, "enable_fp_fusion": False}
LIMIT = tl.constexpr(2.0**50)  # the grid's: float64 latents give its coordinates back
ROUNDER = tl.constexpr(1.5 * 2.0**52)  # what is added to it loses its fraction, half to even ...
ROUNDER_BITS = tl.constexpr(0x4338000000000000)  # ... and stands in the lowest bits
OFF_GRID = (
    2**62
)  # marks a coordinate that left the grid; no step leads back from it, and its latent is NaN
LOST = tl.constexpr(OFF_GRID)


@triton.jit
def load_wide(ptr, offs, mask, WIDE: tl.constexpr):
    """Elements of any dtype; those of 16 bits by way of float32."""
    value = tl.load(ptr + offs, mask=mask, other=0)
    if value.dtype != tl.float64:
        value = value.to(tl.float32)
    return value.to(WIDE)


@triton.jit
def store_narrow(ptr, offs, value, mask):
    """The inverse of `load_wide`; float64 becomes a 16-bit number by way of float32, as in
    torch.
    """
    if ptr.dtype.element_ty != tl.float64:
        value = value.to(tl.float32)
    tl.store(ptr + offs, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def block_of(numel, BLOCK: tl.constexpr):
    """This program's elements: (offsets, mask)."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return offs, offs < numel


@triton.jit
def divide(x, y, WIDE: tl.constexpr):
    """x / y, rounded to nearest: the plain division of float32 is not."""
    if tl.float64 == WIDE:
        return x / y
    else:  # noqa: RET505  what follows a return is compiled all the same
        return tl.div_rn(x, y)


@triton.jit
def from_grid(z):
    """A coordinate as float64; NaN if it is lost."""
    return tl.where(z == LOST, float("nan"), z.to(tl.float64))


@triton.jit
def move(z, change):
    """z + round(change); OFF_GRID where the change or the sum is not on the grid, as that of a lost
    z never is.
    """
    inside = tl.abs(change) <= LIMIT  # false for NaN
    rounded = tl.where(inside, change, 0.0) + ROUNDER
    moved = z + (rounded.to(tl.int64, bitcast=True) - ROUNDER_BITS)
    return tl.where(inside & (tl.abs(moved.to(tl.float64)) <= LIMIT), moved, LOST)


@triton.jit
def ddim_step_kernel(
    x_ptr, eps_ptr, eps_uncond_ptr, out_ptr, numel,
    a: tl.float64, b: tl.float64, guidance_scale: tl.float64, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """a*x + b*eps, or with eps guided away from eps_uncond."""
    offs, mask = block_of(numel, BLOCK)
    x = load_wide(x_ptr, offs, mask, WIDE)
    direction = load_wide(eps_ptr, offs, mask, WIDE)
    if eps_uncond_ptr is not None:
        uncond = load_wide(eps_uncond_ptr, offs, mask, WIDE)
        direction = uncond + tl.full((), guidance_scale, WIDE) * (direction - uncond)
    out = tl.full((), a, WIDE) * x + tl.full((), b, WIDE) * direction
    store_narrow(out_ptr, offs, out, mask)


@triton.jit
def leapfrog_step_kernel(
    far_ptr, near_ptr, eps_ptr, out_ptr, numel,
    c_far: tl.float64, c_near: tl.float64, c_eps: tl.float64, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """c_far*far + c_near*near + c_eps*eps."""
    offs, mask = block_of(numel, BLOCK)
    far = tl.full((), c_far, WIDE) * load_wide(far_ptr, offs, mask, WIDE)
    near = tl.full((), c_near, WIDE) * load_wide(near_ptr, offs, mask, WIDE)
    out = far + near + tl.full((), c_eps, WIDE) * load_wide(eps_ptr, offs, mask, WIDE)
    store_narrow(out_ptr, offs, out, mask)


@triton.jit
def edict_kernel(
    x_ptr, y_ptr, eps_ptr, x_out_ptr, y_out_ptr, numel,
    a: tl.float64, b: tl.float64, mix: tl.float64, rest: tl.float64,
    COUPLE_X: tl.constexpr, INVERSE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A coupling, unless there is no eps, then the mix or its inverse; rest is 1 - mix."""
    offs, mask = block_of(numel, BLOCK)
    x = load_wide(x_ptr, offs, mask, WIDE)
    y = load_wide(y_ptr, offs, mask, WIDE)
    p, q = tl.full((), mix, WIDE), tl.full((), rest, WIDE)
    if eps_ptr is not None:
        change = tl.full((), b, WIDE) * load_wide(eps_ptr, offs, mask, WIDE)
        if COUPLE_X:
            x = tl.full((), a, WIDE) * x + change
        else:
            y = tl.full((), a, WIDE) * y + change
    if INVERSE:
        y = divide(y - q * x, p, WIDE)
        x = divide(x - q * y, p, WIDE)
    else:
        x = p * x + q * y
        y = q * x + p * y
    store_narrow(x_out_ptr, offs, x, mask)
    store_narrow(y_out_ptr, offs, y, mask)


@triton.jit
def exact_leapfrog_kernel(
    far_ptr, near_ptr, eps_ptr, z_ptr, latent_ptr, numel,
    c_near: tl.float64, c_eps: tl.float64, to_latent: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """far + round(c_near*near + c_eps*eps), without near if there is none."""
    offs, mask = block_of(numel, BLOCK)
    change = c_eps * load_wide(eps_ptr, offs, mask, tl.float64)
    if near_ptr is not None:
        change = c_near * from_grid(tl.load(near_ptr + offs, mask=mask, other=0)) + change
    z = move(tl.load(far_ptr + offs, mask=mask, other=0), change)
    tl.store(z_ptr + offs, z, mask=mask)
    store_narrow(latent_ptr, offs, to_latent * from_grid(z), mask)


@triton.jit
def exact_edict_kernel(
    x_ptr, y_ptr, eps_ptr, x_out_ptr, y_out_ptr, latent_ptr, numel,
    step: tl.float64, x_shear: tl.float64, y_shear: tl.float64, to_latent: tl.float64,
    COUPLE_X: tl.constexpr, LATENT_X: tl.constexpr, INVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A coupling, unless there is no eps, then two shears or their inverses."""
    offs, mask = block_of(numel, BLOCK)
    x = tl.load(x_ptr + offs, mask=mask, other=0)
    y = tl.load(y_ptr + offs, mask=mask, other=0)
    if eps_ptr is not None:
        change = step * load_wide(eps_ptr, offs, mask, tl.float64)
        if COUPLE_X:
            x = move(x, change)
        else:
            y = move(y, change)
    if INVERSE:
        y = move(y, -(y_shear * from_grid(x)))
        x = move(x, -(x_shear * from_grid(y)))
    else:
        x = move(x, x_shear * from_grid(y))
        y = move(y, y_shear * from_grid(x))
    tl.store(x_out_ptr + offs, x, mask=mask)
    tl.store(y_out_ptr + offs, y, mask=mask)
    latent = x if LATENT_X else y
    store_narrow(latent_ptr, offs, to_latent * from_grid(latent), mask)


def ddim_step(
    x: Tensor, eps: Tensor, eps_uncond: Tensor | None, a: float, b: float, guidance_scale: float
) -> Tensor:
    """As `reference.ddim_step`."""
    out = torch.empty_like(x)
    _launch(ddim_step_kernel, (x, eps, eps_uncond, out), (a, b, guidance_scale), WIDE=_wide(x))
    return out


def leapfrog_step(
    far: Tensor, near: Tensor, eps: Tensor, c_far: float, c_near: float, c_eps: float
) -> Tensor:
    """As `reference.leapfrog_step`."""
    out = torch.empty_like(far)
    _launch(leapfrog_step_kernel, (far, near, eps, out), (c_far, c_near, c_eps), WIDE=_wide(far))
    return out


def edict_mix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.edict_mix`."""
    return _edict(x, y, eps, a, b, mix, couple_x, inverse=False)


def edict_unmix(
    x: Tensor, y: Tensor, eps: Tensor | None, a: float, b: float, mix: float, couple_x: bool
) -> tuple[Tensor, Tensor]:
    """As `reference.edict_unmix`."""
    return _edict(x, y, eps, a, b, mix, couple_x, inverse=True)


def exact_couple(
    z: Tensor, eps: Tensor, step: float, to_latent: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """As `reference.exact_couple`; what leaves the grid becomes OFF_GRID, its latent NaN."""
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
    """As `reference.exact_leapfrog`; what leaves the grid becomes OFF_GRID, its latent NaN."""
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
    """As `reference.exact_mix`; what leaves the grid becomes OFF_GRID, its latent NaN."""
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
    """As `reference.exact_unmix`; what leaves the grid becomes OFF_GRID, its latent NaN."""
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
        kernel[(triton.cdiv(numel, BLOCK),)](*tensors, numel, *numbers, **options, **LAUNCH)
