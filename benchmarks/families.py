"""The families of rows, each a module with WORKLOADS, `entries` and `measure`."""

from __future__ import annotations

from types import ModuleType

from .harness import machine
from .host_cost import calls, launch
from .layout_attention import attention
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


def families() -> dict[str, ModuleType]:
    """The families that this machine measures."""
    return GPU_FAMILIES if machine.on_gpu() else FAMILIES
