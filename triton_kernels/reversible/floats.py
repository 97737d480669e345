"""Steps in floats."""

from __future__ import annotations

import triton
import triton.language as tl

from dense_attn.triton_kernels.reversible.memory import block_of, load_wide, store_narrow


@triton.jit
def divide(x, y, WIDE: tl.constexpr):
    """x / y, rounded to nearest: the plain division of float32 is not."""
    if tl.float64 == WIDE:
        return x / y
    else:  # noqa: RET505  what follows a return is compiled all the same
        return tl.div_rn(x, y)


@triton.jit
def ddim_step_kernel(
    x_ptr,
    eps_ptr,
    eps_uncond_ptr,
    out_ptr,
    numel,
    a: tl.float64,
    b: tl.float64,
    guidance_scale: tl.float64,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
    far_ptr,
    near_ptr,
    eps_ptr,
    out_ptr,
    numel,
    c_far: tl.float64,
    c_near: tl.float64,
    c_eps: tl.float64,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """c_far*far + c_near*near + c_eps*eps."""
    offs, mask = block_of(numel, BLOCK)
    far = tl.full((), c_far, WIDE) * load_wide(far_ptr, offs, mask, WIDE)
    near = tl.full((), c_near, WIDE) * load_wide(near_ptr, offs, mask, WIDE)
    out = far + near + tl.full((), c_eps, WIDE) * load_wide(eps_ptr, offs, mask, WIDE)
    store_narrow(out_ptr, offs, out, mask)


@triton.jit
def edict_kernel(
    x_ptr,
    y_ptr,
    eps_ptr,
    x_out_ptr,
    y_out_ptr,
    numel,
    a: tl.float64,
    b: tl.float64,
    mix: tl.float64,
    rest: tl.float64,
    COUPLE_X: tl.constexpr,
    INVERSE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
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
