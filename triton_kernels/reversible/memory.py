"""Elements of dense memory: what every step reads and writes."""

from __future__ import annotations

import triton
import triton.language as tl


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
