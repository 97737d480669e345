"""Steps on the integer grid."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.reversible.memory import block_of, load_wide, store_narrow

LIMIT = tl.constexpr(2.0**50)  # the grid's: float64 latents give its coordinates back
ROUNDER = tl.constexpr(1.5 * 2.0**52)  # what is added to it loses its fraction, half to even ...
ROUNDER_BITS = tl.constexpr(0x4338000000000000)  # ... and stands in the lowest bits
# Marks a coordinate that left the grid; no step leads back from it, and its latent is NaN.
OFF_GRID = 2**62
LOST = tl.constexpr(OFF_GRID)


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
def exact_leapfrog_kernel(
    far_ptr,
    near_ptr,
    eps_ptr,
    z_ptr,
    latent_ptr,
    numel,
    c_near: tl.float64,
    c_eps: tl.float64,
    to_latent: tl.float64,
    BLOCK: tl.constexpr,
):
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
    x_ptr,
    y_ptr,
    eps_ptr,
    x_out_ptr,
    y_out_ptr,
    latent_ptr,
    numel,
    step: tl.float64,
    x_shear: tl.float64,
    y_shear: tl.float64,
    to_latent: tl.float64,
    COUPLE_X: tl.constexpr,
    LATENT_X: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
