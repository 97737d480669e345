"""How a head dim is split, since a tile's columns are a power of two."""

from __future__ import annotations

from functools import lru_cache

# Up to here a head dim is one part on sm_90, in the kernels that are faster so. Forward tiles of 64
# keys at 40 columns: 327 instructions a warp, 360 in two parts; at 72 columns 400 in two and 430 in
# one of 128.
UNDIVIDED, WHOLE = 64, ("fwd", "bwd_q")
# Up to twice as many columns are two parts on sm_80: of a tile with fewer rows than a part has
# columns few keys and the pass over queries are shared out by columns, so that every warp asks the
# others for its rows' weights. Cycles at 128 columns: the pass 10,430 in one part and 4,800 in two,
# few keys 9,240 and 4,660.
HALF = 64


def next_power_of_2(number: int) -> int:
    """The smallest power of two that is not below a number; Triton's own takes long to say it."""
    return 1 << max(number - 1, 0).bit_length()


@lru_cache(maxsize=256)
def head_parts(kernel: str, architecture: str, precision: str, head_dim: int) -> tuple[int, int]:
    """Powers of two that cover a head dim, the second 0 where the first does; 16 columns are the
    least. kernel: fwd (the tiled one), row_fwd, bwd_q or bwd_kv.

    256 is two parts as well: the merge of both phases then holds half of each accumulator at a
    time.
    """
    whole = max(16, next_power_of_2(head_dim))
    kind = architecture, precision
    if kind == ("sm_90", "half") and kernel in WHOLE and head_dim <= UNDIVIDED:
        return whole, 0
    if head_dim > 192:
        return 128, 128
    second = max(16, next_power_of_2(head_dim - whole // 2))
    narrow = architecture == "sm_80" and precision != "ieee" and whole == 2 * HALF
    return (whole // 2, second) if second < whole // 2 or narrow else (whole, 0)
