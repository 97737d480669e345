"""A launch configuration: the tile of a kernel, and how it is launched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Config:
    """Rows and keys of a tile, and how the compiler spreads and pipelines them."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int
    # The first phase's accumulator waits in memory: registers would not hold both.
    parks: bool = False
    # Groups of warps that fetch and that weigh, by `fwd_specialised`.
    specialised: bool = False
    # Bytes a thread that may wait in local memory, for the reason beside the row.
    spills: int = 0
    half_spills: int | None = 0  # with half tiles, None where none are taken
    splits: int = 1  # programs that share a tile's queries, in the pass over keys

    @cached_property
    def options(self) -> dict[str, int | bool]:
        """The compiler's options; sums and products may fuse."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }

    @cached_property
    def launch(self) -> dict[str, int | bool]:
        """The arguments of a launch that are the configuration's."""
        shared = {"SPLITS": self.splits} if self.splits > 1 else {}
        return {"BLOCK_M": self.BLOCK_M, "BLOCK_N": self.BLOCK_N, **shared, **self.options}
