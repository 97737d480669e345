"""From noise to an image and back: how far off each sampler lands, by precision and steps."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dense_attn._backends import table

from ..harness import machine
from ..harness.measure import OURS, Entry, Row, Setting, wanted
from .chain import sampler
from .chains import EpsFn, schedule
from .unet import TinyNet

_STEPS = (10, 50, 200, 1000)
_SAMPLERS = ("edict", "bdia", "belm", "ddim")
_EXACT = ("edict", "bdia")  # the others have no form on an integer grid
_SHAPE = (1, 4, 16, 16)
_COARSEST_GRID = 2.0**-20
WORKLOADS = {f"round-trip-{name}-{steps}": (name, steps) for name in _SAMPLERS for steps in _STEPS}
# Sampled on a GPU, inverted on a CPU.
GPU_WORKLOADS = {f"round-trip-{name}-across": (name, 50) for name in _EXACT}
Pair = tuple[Tensor, Tensor]


def mix_of(steps: int) -> float:
    """EDICT's usual 0.93, which a grid of 52 bits cannot follow for 1000 steps."""
    return 0.93 if steps <= 200 else 0.99


def entries(quick: bool = False, names: list[str] | None = None) -> Iterator[Entry]:
    """All rows of the workloads named, of all without names."""
    rows = (
        Entry(Setting(workload, "loop", precision), "naive" if name == "ddim" else OURS)
        for workload, (name, _) in WORKLOADS.items()
        for precision in ("float16", "float32", "float64", "exact")
        if precision != "exact" or name in _EXACT
    )
    across = (Entry(Setting(workload, "loop", "exact"), OURS) for workload in GPU_WORKLOADS)
    every = [*rows, *(across if machine.on_gpu() else ())]
    return wanted(every, quick, names, lambda entry: _sampler_and_steps(entry)[1] <= 50)


def _sampler_and_steps(entry: Entry) -> tuple[str, int]:
    return (WORKLOADS | GPU_WORKLOADS)[entry.setting.workload]


def there_and_back(
    name: str, steps: int, network: EpsFn, start: Pair | tuple[Tensor, None], exact: bool
) -> Pair:
    """The pair of noises that a pair of noises comes back as."""
    if name == "ddim":
        return _naive(network, start[0], steps)
    dtype = torch.float64 if start[0].dtype == torch.float64 and not exact else torch.float32
    chain = sampler(steps, mix_of(steps), method=name, exact=exact, dtype=dtype)
    return chain.invert(network, *chain.sample(network, *start))


def across(name: str, steps: int, network: EpsFn, start: Pair | tuple[Tensor, None]) -> Pair:
    """A round trip sampled on the GPU and inverted on the CPU, which predicts on both ways."""

    def predict(x: Tensor, t: int) -> Tensor:
        return network(x.cpu(), t).to(x.device)

    how = {"mix": mix_of(steps), "method": name, "exact": True}
    here, missing = machine.current().device, table.missing("cpu", "ReversibleSampler")
    chain = sampler(steps, **how)
    way_back = sampler(steps, **how, backend="reference" if missing else "cpu")
    moved = tuple(x if x is None else x.to(here) for x in start)
    end = way_back.invert(predict, *(x.cpu() for x in chain.sample(predict, *moved)))
    return tuple(x if x is None else x.to(here) for x in end)


def _naive(network: EpsFn, x: Tensor, steps: int) -> Pair:
    """DDIM, and back with the prediction at the wrong end of each step, as DDIM inversion does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    walk = schedule(steps)
    for step in walk:
        x = step.a * x + step.b * network(x.to(wide), step.t).to(x.dtype)
    for step in reversed(walk):
        x = (x - step.b * network(x.to(wide), step.t).to(x.dtype)) / step.a
    return x, x


def differing_bits(a: Tensor, b: Tensor) -> int:
    """Bits that differ between two tensors of one dtype."""
    words = [x.cpu().contiguous().view(torch.uint8).numpy() for x in (a, b)]
    return int(np.unpackbits(np.bitwise_xor(*words)).sum())


def measure(entry: Entry) -> Row:
    """The row of an entry, which has no time: the largest error, and how many bits differ."""
    name, steps = _sampler_and_steps(entry)
    both = entry.setting.workload in GPU_WORKLOADS
    exact = entry.setting.dtype == "exact"
    dtype = torch.float32 if exact else getattr(torch, entry.setting.dtype)
    row = entry.describe("round_trip", _SHAPE, "ReversibleSampler")
    row |= {"sampler": f"{name} across devices" if both else name, "steps": steps}
    row["mix"] = mix_of(steps) if name == "edict" else None
    x = torch.randn(_SHAPE, generator=torch.Generator().manual_seed(0))
    x = x.to(machine.current().device, dtype)
    network = TinyNet()

    def loop(start: Pair | tuple[Tensor, None]) -> Pair:
        if both:
            return across(name, steps, network, start)
        return there_and_back(name, steps, network, start, exact)

    with torch.no_grad():
        start = (x, x) if name == "edict" else (x, None)
        if exact:  # float32 is not on the grid: a first round trip puts it there
            start = loop(start)
            row["grid_error"] = (start[0] - x).abs().max().item()
        end = loop(start)
    pairs = [(a, b) for a, b in zip(start, end) if a is not None]
    error = max((a.double() - b.double()).abs().max().item() for a, b in pairs)
    if not math.isfinite(error):
        return row | {"reason": f"leaves the range of {entry.setting.dtype}"}
    differing, bits = (
        sum(differing_bits(*pair) for pair in pairs),
        8 * sum(a.nbytes for a, _ in pairs),
    )
    row |= {"error": error, "differing_bits": differing, "bits": bits}
    if exact and (differing or row["grid_error"] > _COARSEST_GRID):
        reason = f"{differing} bits differ, and the grid is {row['grid_error']:.2g} off"
        row |= {"reason": reason, "wrong": True}
    return row
