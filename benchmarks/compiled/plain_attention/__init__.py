"""Plain flash attention, the yardstick of the layout attention kernels: forward and backward.

No regions, strengths or orders; else tiles, precision and the parts of a head dim can be theirs, so
that the same compiler has the same task but for the modulation. Whole tiles are visited without
masks, the one that the tokens end in after them. Knows torch and triton alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bwd import plain_attention_bwd_kv_kernel, plain_attention_bwd_q_kernel
from .fwd import plain_attention_fwd_kernel
from .primitives import GRAIN


class Tile(NamedTuple):
    """Rows and keys of a tile, and how the compiler spreads and pipelines them."""

    block_m: int = 128
    block_n: int = 64
    num_warps: int = 8
    num_stages: int = 3
    parts: tuple[int, int] | None = None  # of a head dim, if they are not those of `head_parts`

    @property
    def launch(self) -> dict[str, int | bool]:
        """The arguments of a launch that are the tile's; sums and products may fuse, as theirs."""
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return blocks | options | {"enable_fp_fusion": True}


# Those of head dim 64 on sm_90.
FORWARD = Tile()
BY_QUERY, BY_KEY = Tile(block_n=32), Tile(block_m=64, block_n=128, num_stages=2)


def attention_fwd(
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    scale: float,
    tile: Tile = FORWARD,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """(out, lse) of softmax(scale*q@k.T)@v."""
    numbers, constants = _checked(q, k, scale, precision, tile)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    tensors = (*map(_rows, (q, k, v, out)), lse)
    plain_attention_fwd_kernel[_grid(q, tile.block_m)](
        *tensors, *numbers, **constants, **tile.launch
    )
    return out, lse


def attention_bwd_q(
    grad_out: Tensor,  # [B, H, M, D]
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    out: Tensor,  # [B, H, M, D]
    lse: Tensor,  # [B, H, M]
    scale: float,
    tile: Tile = BY_QUERY,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """(dq, delta), delta [B, H, M] for `attention_bwd_kv`."""
    numbers, constants = _checked(q, k, scale, precision, tile)
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    tensors = (*map(_rows, (grad_out, q, k, v, out)), lse, delta, _rows(dq))
    plain_attention_bwd_q_kernel[_grid(q, tile.block_m)](
        *tensors, *numbers, **constants, **tile.launch
    )
    return dq, delta


def attention_bwd_kv(
    grad_out: Tensor,  # [B, H, M, D]
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    lse: Tensor,  # [B, H, M]
    delta: Tensor,  # [B, H, M]
    scale: float,
    tile: Tile = BY_KEY,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """(dk, dv)."""
    numbers, constants = _checked(q, k, scale, precision, tile)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    tensors = (*map(_rows, (grad_out, q, k, v)), lse, delta, _rows(dk), _rows(dv))
    plain_attention_bwd_kv_kernel[_grid(k, tile.block_n)](
        *tensors, *numbers, **constants, **tile.launch
    )
    return dk, dv


def attention_bwd(
    grad_out: Tensor,  # [B, H, M, D]
    q: Tensor,  # [B, H, M, D]
    k: Tensor,  # [B, H, N, D]
    v: Tensor,  # [B, H, N, D]
    out: Tensor,  # [B, H, M, D]
    lse: Tensor,  # [B, H, M]
    scale: float,
    tiles: tuple[Tile, Tile] = (BY_QUERY, BY_KEY),
    precision: str = "ieee",
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv); tiles: of the pass over query tiles, and of that over key tiles."""
    dq, delta = attention_bwd_q(grad_out, q, k, v, out, lse, scale, tiles[0], precision)
    return dq, *attention_bwd_kv(grad_out, q, k, v, lse, delta, scale, tiles[1], precision)


def head_parts(head_dim: int) -> tuple[int, int]:
    """Powers of two that cover a head dim, as most layout attention kernels split it."""
    if head_dim > 192:
        return 128, 128
    first = max(16, 1 << (head_dim.bit_length() - 1))
    second = 0 if head_dim <= first else max(16, 1 << (head_dim - first - 1).bit_length())
    return (first, second) if second < first else (2 * first, 0)


def _checked(q: Tensor, k: Tensor, scale: float, precision: str, tile: Tile) -> tuple[tuple, dict]:
    """The numbers and the constants of a launch."""
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
    if 0 in (*q.shape, *k.shape):
        raise ValueError(f"q and k must not be empty, got {tuple(q.shape)} and {tuple(k.shape)}")
    parts = tile.parts or head_parts(q.shape[3])
    constants = {"PARTS": (q.shape[3], *parts), "PRECISION": precision}
    return (q.shape[1], q.shape[2], k.shape[2], scale), constants


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """[B, H, tokens, D] as kernels take it."""
    *strides, last = x.stride()
    if last != 1 or any(stride % GRAIN for stride in strides):
        raise ValueError(
            f"strides must be multiples of {GRAIN} but for a last one of 1, got {x.stride()}"
        )
    return x, *(stride // GRAIN for stride in strides)


def _grid(x: Tensor, block: int) -> tuple[int]:
    """One program a tile of tokens of a head."""
    return (x.shape[0] * x.shape[1] * -(-x.shape[2] // block),)
