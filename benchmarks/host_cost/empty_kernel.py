"""A kernel that does nothing: what a plain Triton launch costs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def empty_kernel(x, count, BLOCK: tl.constexpr):  # noqa: ANN001, ANN201
    """Nothing."""
