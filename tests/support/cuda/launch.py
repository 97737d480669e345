"""Launches of the CUDA library, run by the emulator of PTX."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from ptx import Fault, Module, Unsupported
from torch import Tensor

from . import build

_MAGIC, _IS_PTX = 0xBA55ED50, 1


class Launch(ctypes.Structure):
    """A launch, as the stand-in runtime has it."""

    _fields_ = (
        ("kernel", ctypes.c_char_p),
        ("image", ctypes.c_void_p),
        ("grid", ctypes.c_int32 * 3),
        ("block", ctypes.c_int32 * 3),
        ("shared_bytes", ctypes.c_uint64),
        ("arguments", ctypes.POINTER(ctypes.c_void_p)),
    )


_Launcher = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Launch))


@dataclass(frozen=True)
class Run:
    """A launch that has been emulated."""

    kernel: str
    executed: int  # instructions of warps
    grid: tuple[int, ...]
    block: tuple[int, ...]


class Runtime:
    """The stand-in of a library that is loaded."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(build.library()))
        self._modules: dict[int, Module] = {}
        self._kept = None

    def set_launcher(self, launch: object) -> None:
        """Hand every launch to a function, which returns the text of what went wrong."""

        def called(pointer: object) -> int:
            text = launch(pointer.contents)
            self._library.set_error((text or "").encode())
            return int(text is not None)

        self._kept = _Launcher(called) if launch else _Launcher()
        self._library.set_launcher(self._kept)

    def set_device_shared(self, count: int) -> None:
        """Stand in for a GPU whose blocks can have so many bytes of shared memory."""
        self._library.set_device_shared(count)

    def leave_out(self) -> None:
        """Let launches do nothing, which leaves what the host does."""
        self._library.set_launcher(self._library.launch_nothing)

    def module(self, launch: Launch) -> Module:
        """The PTX that holds a kernel."""
        key = launch.image
        if key not in self._modules:
            self._modules[key] = Module(ptx_of(launch.image))
        return self._modules[key]

    def memory(self, structs: list[bytes]) -> list[Tensor]:
        """The storages of all tensors that the arguments point into."""
        words = {
            word for x in structs for (word,) in struct.iter_unpack("<Q", x[: len(x) // 8 * 8])
        }
        found = {}
        for i in range(self._library.count_spans()):
            both = (ctypes.c_void_p * 2)()
            self._library.get_span(i, both)
            begin, end = both
            if begin is not None and any(begin <= word < end for word in words):
                found[begin] = _bytes_at(begin, end - begin)
        return list(found.values())


def _bytes_at(address: int, count: int) -> Tensor:
    array = (ctypes.c_uint8 * count).from_address(address)
    return torch.from_numpy(np.frombuffer(array, np.uint8))


def ptx_of(image: int) -> str:
    """The PTX in a fat binary: a header, then images with headers of their own."""
    magic, _, header_bytes, bytes_ = struct.unpack("<IHHQ", ctypes.string_at(image, 16))
    if magic != _MAGIC:
        raise Unsupported(f"a fat binary of magic {magic:#x}")
    at, end = image + header_bytes, image + header_bytes + bytes_
    while at < end:
        kind, _, header, size = struct.unpack("<HHIQ", ctypes.string_at(at, 16))
        if kind == _IS_PTX:
            return ctypes.string_at(at + header, size).rstrip(b"\0").decode()
        at += header + size
    raise Unsupported("a fat binary without PTX")


@contextmanager
def launches_left_out(runtime: Runtime) -> Iterator[None]:
    """No launch in its body does anything: what is left is the host's cost."""
    runtime.leave_out()
    try:
        yield
    finally:
        runtime.set_launcher(None)


@contextmanager
def emulated(
    runtime: Runtime, order: str = "forward", harsh: bool = False, seed: int = 0
) -> Iterator[list[Run]]:
    """Every launch in its body is emulated; a fault is raised by the op as a RuntimeError, and at
    the end as what it is, lest it be taken for a refusal.
    """
    runs: list[Run] = []
    faults: list[Exception] = []

    def run(launch: Launch) -> str | None:
        try:
            runs.append(_emulate(runtime, launch, order, harsh, seed))
        except Exception as error:  # into C++ none may go
            faults.append(error)
            return f"{type(error).__name__}: {error}"
        return None

    runtime.set_launcher(run)
    try:
        yield runs
    finally:
        runtime.set_launcher(None)
        if faults:
            raise faults[0]


def _emulate(runtime: Runtime, launch: Launch, order: str, harsh: bool, seed: int) -> Run:
    module, kernel = runtime.module(launch), launch.kernel.decode()
    sizes = module.parameter_bytes(kernel)
    arguments = [ctypes.string_at(launch.arguments[i], size) for i, size in enumerate(sizes)]
    given = (kernel, arguments, tuple(launch.grid), tuple(launch.block), launch.shared_bytes)
    options = {"harsh": harsh, "seed": seed, "memory": runtime.memory(arguments)}
    before = module.executed
    if order == "each":
        module.launch_in_every_order(*given, **options)
    else:
        module.launch(*given, order=order, **options)
    return Run(kernel, module.executed - before, tuple(launch.grid), tuple(launch.block))


__all__ = ["Fault", "Run", "Runtime", "emulated", "launches_left_out"]
