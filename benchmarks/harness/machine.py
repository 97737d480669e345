"""The machine that a process measures: where tensors are, how time and memory are read."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dense_attn import _memory

Result = TypeVar("Result")
Mark = Any  # a moment: seconds on a CPU, an event in the stream on a GPU
SUITES = ("cpu", "cuda")


class Cpu:
    """The processor; its memory as the operating system sees it."""

    suite = "cpu"  # which rows there are
    device = torch.device("cpu")
    dry_run = False

    def memory_bytes(self) -> int:
        """The machine's memory."""
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

    def synchronize(self) -> None:
        """Wait for what was started; a CPU's calls end before they return."""

    def peak_extra_bytes(self, call: Callable[[], Result]) -> tuple[int | None, Result]:
        """Bytes by which memory grows at most in a call, its result included, and the result."""
        return _memory.peak_extra_bytes(call)

    def release(self) -> None:
        """Give cached memory back; a CPU's calls keep none."""

    def mark(self) -> Mark:
        """This moment."""
        return time.perf_counter()

    def between(self, start: Mark, end: Mark) -> float:
        """Seconds from one moment to another."""
        return end - start


class Gpu:
    """A GPU that torch sees, as its own events and its allocator tell."""

    suite = "cuda"
    device = torch.device("cuda")
    dry_run = False
    _LEAST_FLUSH = 2**26  # bytes

    def __init__(self) -> None:
        self._flush: torch.Tensor | None = None

    def memory_bytes(self) -> int:
        """The GPU's memory."""
        return torch.cuda.get_device_properties(self.device).total_memory

    def synchronize(self) -> None:
        """Wait for what was enqueued."""
        torch.cuda.synchronize()

    def peak_extra_bytes(self, call: Callable[[], Result]) -> tuple[int | None, Result]:
        """Bytes that torch's allocator hands out beyond those before, at most, and the result."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before, result

    def mark(self) -> Mark:
        """An event, which the GPU passes when it has done what stands before it."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Mark, end: Mark) -> float:
        """Seconds between two events that the GPU has passed."""
        return start.elapsed_time(end) / 1e3

    def flush(self) -> None:
        """Write more than the L2 cache holds, so that no call finds its inputs there."""
        if self._flush is None:
            cache = torch.cuda.get_device_properties(self.device).L2_cache_size
            self._flush = torch.empty(
                max(2 * cache, self._LEAST_FLUSH), dtype=torch.int8, device=self.device
            )
        self._flush.zero_()

    def capture(self, call: Callable[[], Result]) -> tuple[Callable[[], None], Result]:
        """A CUDA graph of one call: what replays it, and the results that a replay writes."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            call()  # a first one allocates and compiles, which a graph cannot hold
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = call()
        return graph.replay, results

    def release(self) -> None:
        """Give cached memory back: after a row that ran out of it, the next must find it."""
        torch.cuda.empty_cache()


Machine = Cpu | Gpu
_current: Machine = Cpu()


def current() -> Machine:
    """The machine of this run."""
    return _current


def use(suite: str, dry_run: bool = False) -> Machine:
    """Measure a CPU or a GPU from here on; a dry run has the rows of a GPU and needs none."""
    global _current
    if dry_run:
        from .dry_run import DryGpu, hasten

        hasten()
        _current = DryGpu()
    else:
        _current = Cpu() if suite == "cpu" else Gpu()
    if on_gpu():  # a float32 row is of float32, and a chain must give the same bits twice
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    return _current


def on_gpu() -> bool:
    """Whether the rows are those of a GPU."""
    return _current.suite == "cuda"
