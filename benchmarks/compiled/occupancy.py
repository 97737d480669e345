"""Programs that a device holds at once, and the waves in which it runs those of a workload."""

from __future__ import annotations

from math import ceil
from typing import NamedTuple

from ..layout_attention.workloads import Workload, on_a_gpu
from .counts import PARTITIONS

REGISTERS = 512  # a lane of a partition: 65,536 an SM of NVIDIA's; gfx942 has them as well
GRANULE = 8  # registers a lane that are given together
MOST_PROGRAMS = 32  # an SM


class Device(NamedTuple):
    """The device that a target stands for."""

    name: str
    processors: int  # SMs or compute units
    shared: int  # bytes each
    reserved: int  # bytes a program beside its own
    warps: int  # a partition


DEVICES = {
    "sm_80": Device("A100", 108, 164 << 10, 1 << 10, 16),
    "sm_90": Device("H200", 132, 228 << 10, 1 << 10, 16),
    "sm_100": Device("B200", 148, 228 << 10, 1 << 10, 16),  # tensor memory may allow fewer
    "gfx942": Device("MI300X", 304, 64 << 10, 0, 8),
}


def programs_a_processor(target: str, registers: int, shared: int, warps: int) -> int:
    """Programs that registers, shared memory and warps leave room for; 0 for none."""
    device = DEVICES[target]
    rounded = max(1, -(-registers // GRANULE)) * GRANULE
    by_warps = PARTITIONS * min(device.warps, REGISTERS // rounded) // warps
    needed = shared + device.reserved
    return min(by_warps, device.shared // needed if needed else MOST_PROGRAMS, MOST_PROGRAMS)


def waves(
    target: str, kernel: str, head_dim: int, tile: tuple[int, int], programs: int
) -> dict[str, float]:
    """Rounds of full occupancy that each workload of a head dim takes, by its name; `programs` a
    processor.
    """
    at_once = DEVICES[target].processors * programs
    return {
        workload.name: round(_programs(workload, kernel, tile) / at_once, 2)
        for workload in on_a_gpu()
        if workload.head_dim == head_dim and _runs(workload, kernel)
    }


def _runs(workload: Workload, kernel: str) -> bool:
    """Whether a workload launches the kernel: few keys have a forward kernel of their own."""
    if not kernel.endswith("fwd"):
        return True
    return (workload.kind == "cross") == (kernel == "row_fwd")


def _programs(workload: Workload, kernel: str, tile: tuple[int, int]) -> int:
    """Tiles of queries, or of keys for the pass over them, of all heads."""
    by_key = kernel == "bwd_kv"
    tokens = workload.seqlen_k if by_key else workload.seqlen_q
    return workload.batch * workload.num_heads * ceil(tokens / tile[by_key])
