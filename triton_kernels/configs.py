"""Every launch configuration, as data: per architecture and head dim, with its reason.

No row has been timed: each is the largest of the tiles tried that ahead-of-time compilation (Triton
3.9, 3.6, `range`, tokens in an order, the most registers a call can need) keeps within the
registers and the shared memory, or that the counts of its instructions speak for.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache, lru_cache

import torch
import triton
from torch import Tensor

from dense_attn.triton_kernels.config import Config
from dense_attn.triton_kernels.parts import head_parts

Table = dict[str, dict[int, Config]]  # architecture -> largest head dim -> configuration

GRAIN = 8  # elements: 16 bytes, the widest load, in the narrowest dtype
# Keys of a tile that holds a whole row of scores: 80 and 96 are 64 and a second part. More would
# not leave room for the accumulator.
ROW_TILES = (16, 32, 64, 80, 96, 128)
ROW_KEYS = ROW_TILES[-1]
INTERPRETED = Config(64, 32, 1, 1)  # small, so that small cases have several tiles of every kind

# Both states of a tile in doubt fill the registers, so what waits for the end of the kernel spills:
# once a program, where a smaller tile would cost every round. `spills` bounds it, by both Tritons;
# of the instructions of a round over a whole tile at most one in 32 is for what has spilled. Three
# stages keep keys two tiles ahead.
FORWARD: Table = {
    # Also for devices of 99 KB of shared memory (sm_86, sm_89, sm_120), which every row keeps
    # within.
    "sm_80": {
        64: Config(128, 64, 8, 3, spills=40, half_spills=144),
        96: Config(128, 32, 8, 3, parks=True, half_spills=160),
        # 16 keys spill nothing and take 3,616 cycles, not 2,960; what spills is not of a round.
        128: Config(128, 32, 8, 3, parks=True, spills=32, half_spills=312),
        # Not parked, since 128 columns that are need more memory than 99 KB on their way.
        160: Config(128, 16, 8, 3, spills=160, half_spills=320),
        # 64 rows, in eight warps, spill 1,432 bytes.
        256: Config(32, 32, 4, 3, parks=True, spills=576),
    },
    "sm_90": {
        64: Config(128, 64, 8, 3, spills=48, half_spills=72),
        96: Config(128, 64, 8, 3, spills=192, half_spills=216),
        # 32 keys: 1,190 cycles, not 870.
        128: Config(128, 64, 8, 3, parks=True, spills=112, half_spills=232),
        160: Config(128, 32, 8, 3, parks=True, spills=192, half_spills=264),
        256: Config(64, 32, 8, 3, parks=True, spills=136),
    },
    "sm_100": {
        96: Config(128, 64, 8, 3, spills=64, half_spills=96),
        160: Config(128, 32, 8, 3, parks=True, spills=248, half_spills=216),
        256: Config(64, 32, 8, 3, parks=True, spills=16),
    },
    "gfx942": {
        64: Config(128, 64, 4, 1),
        128: Config(128, 32, 4, 1, parks=True),
        256: Config(64, 32, 4, 1, parks=True),
    },
}
# Keys packed once a call; a group of warps fetches them and two weigh 64 rows each. Instructions a
# warp and 64 keys, then of both populations (by Triton 3.6): 245 (238) and 515 (506) at 64 columns,
# plain attention 240 (230); 352 (352) and 750 (755) at 128, plain attention 376 (352). What spills
# waits outside of the loops over whole tiles, but for 4 instructions of 489 at 64 columns by 3.9.
# Heads of one part alone: 65 to 96 columns as one of 128 take 1,024 cycles, FORWARD's two 784 to
# 828; above 128 two states fill the registers. Half a tile leaves a group no rows: FORWARD's serve.
_NARROW = Config(128, 128, 4, 4, specialised=True, spills=320)  # of three a round counts longer
_WIDE = Config(128, 64, 4, 3, specialised=True, spills=416)  # of 128 keys each round spills
SPECIALISED: Table = {"sm_90": {64: _NARROW, 128: _WIDE}}
_ORDINARY = {own: FORWARD[of][d] for of, rows in SPECIALISED.items() for d, own in rows.items()}
PACKED_KEYS = 1024  # fewer do not pay for a launch that packs them
SHARE = 8  # rounds over tiles of queries that a program has left, beside what it does once
SAVED = 32  # rounds less, of some 500 cycles and more: what three launches take, of 5,000 each
# Small tiles, so that an SM has several programs, whose loads and stores overlap. BLOCK_N is the
# least of ROW_TILES that holds the keys; 128 of them need the most registers.
ROW_FORWARD: Table = {
    "sm_80": {
        96: Config(64, 128, 4, 1),
        128: Config(64, 128, 4, 1),
        192: Config(16, 128, 4, 1),  # registers hold the transposed keys: 32 rows spill 640 bytes
        256: Config(32, 128, 4, 1),
    },
    "sm_90": {192: Config(64, 128, 4, 1), 256: Config(128, 128, 8, 1)},  # 64 rows spill 8 bytes
    "sm_100": {192: Config(64, 128, 4, 1), 256: Config(64, 128, 8, 1)},  # four warps: 8 bytes
    "gfx942": {128: Config(64, 128, 4, 1), 160: Config(32, 128, 4, 1), 256: Config(16, 128, 4, 1)},
}
# Up to 56 bytes may spill, outside of the loop; on gfx942 36, by Triton 3.9 alone.
BACKWARD_Q: Table = {
    "sm_80": {
        96: Config(128, 32, 8, 3),  # 64 rows by four warps spill 24 bytes
        128: Config(64, 32, 4, 3),
        160: Config(32, 32, 4, 3),  # 11,900 cycles; eight warps, which repeat products, 22,500
        256: Config(32, 32, 8, 3),
    },
    "sm_90": {
        80: Config(64, 64, 4, 3),  # two programs a processor; 32 bytes spill at 96 columns
        128: Config(128, 32, 8, 3),  # 64 keys spill 64 bytes at 128 columns
        256: Config(64, 16, 8, 3),  # 32 keys by four warps spill 640 bytes
    },
    "sm_100": {128: Config(128, 32, 8, 3), 256: Config(64, 32, 8, 3)},
    "gfx942": {128: Config(64, 64, 4, 1), 256: Config(64, 32, 4, 1)},
}
# The same, with tiles two ahead on their way. A tile of keys stays, so many keys read
# queries less often, and of 16 a warp, on sm_90 64 for four, no product is made twice.
BACKWARD_KV: Table = {
    "sm_80": {
        80: Config(64, 128, 8, 3),
        128: Config(32, 64, 4, 3),  # two programs a processor; 128 keys, one, 4 % fewer cycles
        160: Config(16, 64, 4, 3),  # 128 keys need more memory than 99 KB
        256: Config(16, 32, 4, 3),  # 64 keys spill 112 bytes at 192 columns
    },
    "sm_90": {
        80: Config(64, 128, 8, 3),  # at 96 columns 56 bytes spill
        128: Config(32, 128, 8, 3),  # 64 rows spill 128 bytes
        160: Config(16, 128, 8, 3),  # 32 rows of 64 keys spill 80 bytes by Triton 3.6
        # By Triton 3.9 56 bytes, used outside of the loop; 64 keys spill none, and issue three
        # times the instructions; by half of the warps 80, 6 instructions of 344 in the loop.
        192: Config(16, 128, 8, 3, half_spills=None),
        256: Config(16, 64, 8, 3),  # 48, as many as plain attention; 128 keys 536
    },
    "sm_100": {
        64: Config(64, 128, 8, 3),
        128: Config(32, 128, 8, 3),
        256: Config(16, 64, 8, 3),
    },
    "gfx942": {64: Config(32, 128, 4, 1), 128: Config(32, 64, 4, 1), 256: Config(16, 64, 4, 1)},
}
# tf32 for NVIDIA's: operands of 4 bytes, so half of the tile; three stages too.
TF32_FORWARD: Table = {
    "sm_80": {
        64: Config(128, 32, 8, 3, half_spills=24),
        128: Config(128, 16, 8, 3, parks=True, spills=128, half_spills=352),
        192: Config(32, 16, 4, 3, parks=True, spills=816),
        256: Config(16, 16, 4, 3, parks=True, spills=328),  # 32 rows: 128 bytes above 99 KB
    },
    "sm_90": {
        64: Config(128, 64, 8, 3, spills=88, half_spills=120),
        128: Config(128, 32, 8, 3, parks=True, spills=56, half_spills=136),
        256: Config(64, 16, 8, 3, parks=True, spills=408),
    },
    "sm_100": {
        64: Config(128, 64, 8, 3, spills=56, half_spills=72),
        128: Config(128, 32, 8, 3, parks=True, spills=80, half_spills=88),
        256: Config(64, 16, 8, 3, parks=True, spills=72),
    },
}
# The loops have both orders of a tile's numbers; but for sm_90's of 64 rows up, twice the copies.
_SMALL = Config(16, 16, 4, 3)
TF32_BACKWARD_Q: Table = {
    "sm_80": {
        64: Config(64, 32, 4, 3),
        128: Config(32, 16, 2, 3),  # four warps fetch twice as much from shared memory
        192: _SMALL,
        256: Config(16, 16, 4, 1),  # tiles two ahead: 132,352 bytes, of 101,376 at most
    },
    # 128 rows at 64 columns, in eight warps, spill 24 bytes by Triton 3.9.
    "sm_90": {64: Config(64, 32, 4, 3), 128: Config(128, 16, 8, 3), 256: _SMALL},
    "sm_100": {64: Config(128, 32, 8, 3), 128: Config(64, 16, 8, 3), 256: _SMALL},
}
TF32_BACKWARD_KV: Table = {
    # 256 columns two tiles ahead take 165,888 bytes, 160 of them more than 102,400.
    "sm_80": {64: Config(16, 128, 8, 3), 128: Config(16, 32, 2, 3), 256: Config(16, 16, 4, 1)},
    # By Triton 3.9 half of the warps spill 104 bytes at 128 columns.
    "sm_90": {64: Config(32, 128, 8, 3), 128: Config(16, 128, 8, 3, half_spills=None), 256: _SMALL},
    "sm_100": {64: Config(32, 128, 8, 3), 128: Config(16, 64, 4, 3), 256: _SMALL},
}
# Exact float32 products run on the ordinary units, whose operands fill registers: small tiles for
# every architecture. Of four warps, or twice the rows or keys, rounds of 256 columns spill.
_FLOAT32 = {
    64: Config(32, 16, 8, 3, parks=True),
    256: Config(16, 16, 8, 3, parks=True, spills=776),
}
_FLOAT32_BACKWARD = {64: Config(32, 16, 8, 3), 256: Config(16, 16, 8, 3)}  # four warps spill 32
FLOAT32: Table = {
    "sm_80": _FLOAT32,
    **{of: {256: _FLOAT32[256]} for of in ("sm_90", "sm_100")},
    "gfx942": {of: replace(config, num_stages=1) for of, config in _FLOAT32.items()},
}
FLOAT32_BACKWARD: Table = {
    **dict.fromkeys(("sm_80", "sm_90", "sm_100"), _FLOAT32_BACKWARD),
    "gfx942": {64: Config(32, 16, 8, 1), 256: Config(16, 16, 4, 1)},  # eight warps spill 420 bytes
}
# By queries 32 rows spill 32 bytes.
FLOAT32_BACKWARD_Q: Table = {of: {256: rows[256]} for of, rows in FLOAT32_BACKWARD.items()}
FLOAT32_ROW_KEYS = 32  # 128 keys spill kilobytes
# Of rows that are not aligned no copy is of one half float: small tiles, backward float32's.
UNALIGNED = Config(32, 16, 4, 1, parks=True, spills=80)
# Eight warps of gfx942 spill 12 bytes.
UNALIGNED_ROW = {"sm_80": Config(16, 128, 8, 1), "gfx942": Config(16, 128, 4, 1)}


def precision(q: Tensor) -> str:
    """How products of q's dtype are made: in "half", as "tf32" where torch allows it for its own,
    or in "ieee".
    """
    if q.dtype != torch.float32:
        return "half"
    allowed = torch.version.cuda is not None and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and q.is_cuda else "ieee"


def layout_attention_fwd(architecture: str, precision: str, head_dim: int, seqlen_k: int) -> Config:
    """The configuration of a forward call; few keys are one tile, whose size is theirs."""
    row = row_at_once(architecture, precision, seqlen_k)
    if architecture == "interpreted":
        config = INTERPRETED
    elif precision == "half" and head_dim % GRAIN:
        config = UNALIGNED_ROW.get(architecture, UNALIGNED_ROW["sm_80"]) if row else UNALIGNED
    elif precision == "half":
        table = ROW_FORWARD if row else FORWARD
        one_part = head_parts("fwd", architecture, precision, head_dim)[1] == 0
        if seqlen_k >= PACKED_KEYS and one_part and architecture in SPECIALISED:
            table = SPECIALISED
        config = _pick(table[architecture], head_dim)
    else:
        config = _pick(
            (TF32_FORWARD if precision == "tf32" and not row else FLOAT32)[architecture], head_dim
        )
    return _one_tile(config, seqlen_k) if row else config


@lru_cache(maxsize=256)  # the same object, which keeps its arguments of a launch
def _one_tile(config: Config, seqlen_k: int) -> Config:
    """A configuration whose tile holds all keys."""
    return replace(config, BLOCK_N=row_tile(seqlen_k), parks=False)


def row_tile(seqlen_k: int) -> int:
    """Keys of the tile that holds a whole row of scores."""
    return next(keys for keys in ROW_TILES if seqlen_k <= keys)


def filling(
    config: Config, tokens: int, heads: int, processors: int, side: str = "BLOCK_M"
) -> Config:
    """A configuration with half of the rows, or of the keys, and warps, where its tiles find a
    processor each, of which whole tiles would leave half without one; for specialised warps of the
    ordinary kernel. A warp's part of a tile stays what it is.
    """
    whole = _ORDINARY.get(config, config)
    rows = getattr(whole, side)
    divides = min(rows // 16, whole.num_warps) >= 8  # into 64 rows, a warp a partition
    fills = heads * -(-2 * tokens // rows) <= processors
    taken = whole.half_spills is not None and divides and fills
    return _half_tile(whole, side) if taken else config


@lru_cache(maxsize=64)
def _half_tile(config: Config, side: str) -> Config:
    half = {side: getattr(config, side) // 2, "num_warps": config.num_warps // 2}
    return replace(config, **half, spills=config.half_spills, half_spills=0)


@lru_cache(maxsize=256)  # the same object, which keeps its arguments of a launch
def splitting(config: Config, queries: int, keys: int, heads: int, processors: int) -> Config:
    """A configuration of the pass over keys whose queries several programs share, a power of two,
    where as many find a processor each, so that fewer rounds pay for the sum of their shares.
    """
    rounds, tiles = -(-queries // config.BLOCK_M), heads * -(-keys // config.BLOCK_N)
    most = min(processors // tiles, rounds // SHARE)
    splits = 1 << max(most, 1).bit_length() - 1
    return replace(config, splits=splits) if rounds + -rounds // splits >= SAVED else config


def row_at_once(architecture: str, precision: str, seqlen_k: int) -> bool:
    """Whether a row of scores is one tile."""
    narrow = precision == "half" or architecture == "interpreted"
    return seqlen_k <= (ROW_KEYS if narrow else FLOAT32_ROW_KEYS)


def layout_attention_bwd(architecture: str, precision: str, head_dim: int) -> tuple[Config, Config]:
    """The configurations of a backward call: of the pass over query tiles, and over key tiles."""
    if architecture == "interpreted":
        return INTERPRETED, INTERPRETED
    if precision == "half" and head_dim % GRAIN:
        unaligned = replace(FLOAT32_BACKWARD[architecture][256], num_stages=1)
        return unaligned, unaligned
    tables = {"half": (BACKWARD_Q, BACKWARD_KV), "tf32": (TF32_BACKWARD_Q, TF32_BACKWARD_KV)}
    by_query, by_key = tables.get(precision, (FLOAT32_BACKWARD_Q, FLOAT32_BACKWARD))
    return _pick(by_query[architecture], head_dim), _pick(by_key[architecture], head_dim)


def _pick(rows: dict[int, Config], head_dim: int) -> Config:
    return next(config for largest, config in rows.items() if head_dim <= largest)


@cache
@torch.compiler.assume_constant_result
def architecture(device: torch.device) -> str:
    """The row of the tables for a device."""
    if interpreted() or torch.version.hip:
        return "interpreted" if interpreted() else "gfx942"
    major = torch.cuda.get_device_capability(device)[0]
    return {9: "sm_90", 10: "sm_100", 11: "sm_100"}.get(major, "sm_80")


@cache
@torch.compiler.assume_constant_result
def processors(device: torch.device) -> int:
    """Processors that run tiles at once; 1 where none is known, so that tiles are the tables'."""
    known = device.type == "cuda"
    return torch.cuda.get_device_properties(device).multi_processor_count if known else 1


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether kernels run through Triton's interpreter, on tensors of the CPU."""
    return triton.knobs.runtime.interpret
