"""The families of rows, each a module with WORKLOADS, `entries` and `measure`."""

from __future__ import annotations

from types import ModuleType

from .harness import machine
from .harness.measure import OURS
from .host_cost import calls, launch
from .layout_attention import attention, baselines, gpu_baselines
from .layout_attention.suite import NEED_FLEX
from .reversible import chain, gradient, round_trip, steps
from .sega import guidance, percentile

FAMILIES = {  # the test of a family is named after it; in the order in which they run
    "attention": attention,
    "percentile": percentile,
    "sega": guidance,
    "steps": steps,
    "chain": chain,
    "gradient": gradient,
    "round_trip": round_trip,
    "host_cost": calls,
}
GPU_FAMILIES = FAMILIES | {"launch": launch}
WORKLOADS = [str(name) for family in FAMILIES.values() for name in family.WORKLOADS]
GPU_WORKLOADS = [*WORKLOADS, *steps.GPU_WORKLOADS, *round_trip.GPU_WORKLOADS, *launch.WORKLOADS]
_OF_KERNELS = ("percentile", "sega", "steps", "launch")
# Of the library and what it is compared with, in every family.
CONTENDERS = sorted(
    {*baselines.CONTENDERS, *gpu_baselines.GPU_CONTENDERS}
    | {
        entry.contender
        for name, family in GPU_FAMILIES.items()
        if name != "attention"
        for entry in family.entries()
    }
)


def families() -> dict[str, ModuleType]:
    """The families that this machine measures."""
    return GPU_FAMILIES if machine.on_gpu() else FAMILIES


def place(name: str, contender: str) -> int:
    """A row's turn on a GPU, whose time may end: the library's ways beside plain attention, then
    the other families, those of kernels first, then what the library's attention is compared with,
    last what compiles for each shape.
    """
    if name != "attention":
        return 1 if name in _OF_KERNELS else 2
    if contender.startswith(OURS) or contender in baselines.PLAIN:
        return 0
    return 4 if contender in NEED_FLEX else 3
