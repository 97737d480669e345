"""A dry run: a GPU's suite on the smallest sizes, kernels interpreted, times without meaning."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from dense_attn._backends import triton

from . import machine

Result = TypeVar("Result")


class DryGpu(machine.Gpu):
    """The processor in a GPU's place: its own memory, and nothing is captured or flushed."""

    device = torch.device("cpu")
    dry_run = True

    def memory_bytes(self) -> int:
        """The machine's memory."""
        return machine.Cpu().memory_bytes()

    def synchronize(self) -> None:
        """Calls end before they return."""

    def peak_extra_bytes(self, call: Callable[[], Result]) -> tuple[None, Result]:
        """Memory is a GPU's affair."""
        return None, call()

    def mark(self) -> float:
        """This moment."""
        return time.perf_counter()

    def between(self, start: float, end: float) -> float:
        """Seconds from one moment to another."""
        return end - start

    def flush(self) -> None:
        """There is no L2 cache that matters."""

    def capture(self, call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """The call itself, and its results."""
        return lambda: (call(), None)[1], call()

    def release(self) -> None:
        """Nothing is cached."""


def hasten() -> None:
    """Let Triton's interpreter do what it does for every operation once, where it is on."""
    if triton.interpreted():
        from .interpreter import changes

        for change in changes():
            setattr(*change)


def shrink() -> None:
    """Give every family its smallest sizes and torch one thread; this process measures nothing."""
    from ..host_cost import launch, public
    from ..layout_attention import workloads
    from ..reversible import chain, gradient, round_trip, steps
    from ..sega import guidance, percentile
    from . import test_limits

    torch.set_num_threads(1)
    for name, workload in workloads.WORKLOADS.items():
        few = {"batch": 1, "num_heads": 1, "groups": 1, "grid": (4, 8)}
        text_tokens = min(workload.text_tokens, 77)
        workloads.WORKLOADS[name] = replace(workload, **few, text_tokens=text_tokens)
    for name, (rows, values) in percentile.WORKLOADS.items():
        percentile.WORKLOADS[name] = min(rows, 2), min(values, 500)
    for name, (concepts, batch, channels, *_) in guidance.WORKLOADS.items():
        guidance.WORKLOADS[name] = min(concepts, 2), batch, min(channels, 2), 4, 4
    steps.SIZES.update(dict.fromkeys(steps.SIZES, 512))
    chain.WORKLOADS.update(dict.fromkeys(chain.WORKLOADS, (1, 4, 8, 8)))
    gradient.WORKLOADS.update(dict.fromkeys(gradient.WORKLOADS, 2))
    chain._STEPS, chain._IDLE_ROUNDS, public.STEPS = 2, 1, 2
    gradient._SHAPE, round_trip._SHAPE = (1, 4, 8, 8), (1, 4, 3, 4)
    launch._CALLS, launch._ROUNDS, launch._SHAPE = 1, 1, (2, 100)
    for name, (sampler, _) in round_trip.GPU_WORKLOADS.items():
        round_trip.GPU_WORKLOADS[name] = sampler, 4
    test_limits._SIDE["cuda"], test_limits._COPIED["cuda"] = 64, 2**10


def chosen(entries: Iterable[Any]) -> Iterator[Any]:
    """The first entry of each kind, contender, pass and dtype, fewer of attention; all of a user's
    own shapes.

    The interpreter has no bfloat16: float16 stands in its place.
    """
    seen = set()
    for entry in entries:
        setting = entry.setting
        if str(setting.dtype).endswith("bfloat16"):
            narrow = "float16" if isinstance(setting.dtype, str) else torch.float16
            setting = replace(setting, dtype=narrow)
        name = str(getattr(setting.workload, "name", setting.workload))
        words = "-".join(word for word in name.split("-") if word.isalpha())
        kind = getattr(setting.workload, "kind", words)
        own = getattr(setting.workload, "own", False)
        key = name if own else kind, setting.passes, setting.dtype, entry.contender
        enough = own or (_short(name) and _enough(kind, setting.passes, setting.dtype))
        if key not in seen and enough:
            seen.add(key)
            yield replace(entry, setting=setting)


def _enough(kind: str, passes: str, dtype: str | torch.dtype) -> bool:
    """Whether a dry run has a row: of attention, an image's tokens forward in both dtypes, in one
    of them backward and other tokens forward; all that is not attention.
    """
    if kind not in ("self", "cross", "joint") or (kind, passes) == ("self", "fwd"):
        return True
    return dtype == torch.float16 and (kind == "self" or passes == "fwd")


def _short(name: str) -> bool:
    """Whether a workload is not a chain of many steps there and back."""
    return not name.startswith("round-trip") or name.endswith(("-10", "across"))
