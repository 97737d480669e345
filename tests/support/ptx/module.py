"""A PTX file whose kernels run on tensors of the CPU."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .build import Options, library
from .encode import Encoded
from .instructions import Instructions
from .parse import Expansion, Unit, Unsupported

MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)
MOST_THREADS, MOST_SHARED = 1024, 227 << 10  # of sm_90
ORDERS = ("forward", "backward", "random")
MOST = 500_000_000  # instructions of a launch, minutes: a kernel that runs longer has no end
FIELDS = 2**25 - 1  # of a tensor map: all have been set
Number = int | float | bool


@dataclass(frozen=True)
class TensorMap:
    """A tensor as bulk copies see it: what cuTensorMapEncodeTiled is told, its last axis first."""

    tensor: Tensor
    type: int  # as tensormap.replace numbers them
    shape: Sequence[int]
    strides: Sequence[int]  # bytes; the last one is that of an element
    box: Sequence[int]
    swizzle: int = 0  # rows of 16 << swizzle bytes
    fill: int = 0  # 1: NaN outside of the tensor

    def pack(self) -> bytes:
        """The map as the machine has it."""
        numbers = [
            *_turned(self.shape, 5),
            *_turned(self.box, 5),
            *_turned([1] * len(self.shape), 5),
        ]
        strides = _turned(self.strides[:-1], 4)
        few = (len(self.shape) - 1, self.type, 0, self.swizzle, self.fill)
        return struct.pack(
            "<5Q15I5B3xI16x", self.tensor.data_ptr(), *strides, *numbers, *few, FIELDS
        )


Argument = Tensor | TensorMap | Number | bytes  # those of a struct, which may hold pointers


class Fault(Exception):
    """A breach by a kernel; the text says which, at what line and by which thread."""


class Module:
    """The kernels of a PTX text."""

    def __init__(self, text: str) -> None:
        self._lines = text.split("\n")
        self._unit = Unit(text)
        self._arrays = [np.frombuffer(bytearray(x), np.uint8) for x in self._unit.globals.values()]
        self._encoded: dict[str, Encoded] = {}
        self.executed = 0  # instructions of warps, of all launches

    def launch_in_every_order(
        self,
        kernel: str,
        arguments: Sequence[Argument],
        *others: object,
        memory: Sequence[Tensor] = (),
        **named: object,
    ) -> None:
        """Launch in each order of warps and programs; Fault where the bits are not the same."""
        given = [*_tensors(arguments), *memory]
        storages = {x.untyped_storage().data_ptr(): x for x in given}
        touched = [_memory(x) for x in storages.values()]
        touched += [torch.from_numpy(x) for x in self._arrays if x.size]
        before, first = [x.clone() for x in touched], None
        for order in ORDERS:
            for now, then in zip(touched, before):
                now.copy_(then)
            self.launch(kernel, arguments, *others, memory=memory, **named, order=order)
            first = first or [x.clone() for x in touched]
            if not all(torch.equal(x, y) for x, y in zip(touched, first)):
                raise Fault(
                    f"{kernel}: the result of {order} order is not that of {ORDERS[0]} order"
                )

    def launch(
        self,
        kernel: str,
        arguments: Sequence[Argument],
        grid: Sequence[int],
        block: Sequence[int],
        dynamic_shared: int = 0,
        order: str = "forward",
        harsh: bool = False,
        seed: int = 0,
        memory: Sequence[Tensor] = (),
    ) -> None:
        """Run every program, its warps in an order between barriers; raises Fault. It may touch the
        memory of its tensors, and that of `memory`, into which structs among the arguments point.
        """
        _check(grid, block, dynamic_shared)
        code = self._code(kernel)
        params = self._params(kernel, arguments)
        storages = self._storages([*_tensors(arguments), *memory])
        shared = -(-(self._unit.shared_bytes + dynamic_shared) // 16) * 16
        three = ctypes.c_int32 * 3
        options = Options(
            three(*grid, *[1] * (3 - len(grid))),
            three(*block, *[1] * (3 - len(block))),
            ORDERS.index(order),
            harsh,
            seed,
            code.num_registers,
            len(params),
            code.local_bytes,
            shared,
            len(storages) // 2,
            MOST,
            self._unit.functions[kernel].max_registers,
        )
        message, executed = ctypes.create_string_buffer(512), ctypes.c_uint64()
        line = library().ptx_run(
            *(_pointer(x) for x in (code.code, code.operands, code.constants)),
            params,
            _pointer(np.array(storages, np.uint64)),
            ctypes.byref(options),
            message,
            len(message),
            ctypes.byref(executed),
        )
        self.executed += executed.value
        if line:
            raise Fault(self._told(kernel, line, message.value.decode()))

    def parameter_bytes(self, kernel: str) -> list[int]:
        """The size of each parameter of a kernel."""
        return [size for _, size in self._unit.functions[kernel].params.values()]

    def _code(self, kernel: str) -> Encoded:
        if kernel not in self._encoded:
            expansion = Expansion(self._unit, kernel)
            arrays = iter(self._arrays)
            places = [x.ctypes.data for x in self._arrays] if arrays else []
            self._encoded[kernel] = Instructions(expansion, places.__getitem__).encode()
        return self._encoded[kernel]

    def _params(self, kernel: str, arguments: Sequence[Argument]) -> bytes:
        places = self._unit.functions[kernel].params.values()
        if len(places) != len(arguments):
            raise ValueError(f"arguments must be {len(places)}, got {len(arguments)}")
        params = bytearray(max((place + size for place, size in places), default=0))
        for (place, size), value in zip(places, arguments):
            if isinstance(value, Tensor) and (size != 8 or value.device.type != "cpu"):
                raise ValueError(f"a tensor must be a pointer to the CPU's, got {value.device}")
            params[place : place + size] = _bytes(value, size)
        return bytes(params)

    def _storages(self, tensors: Sequence[Tensor]) -> list[int]:
        """The beginning and the end of all memory that the launch may touch."""
        storages = [x.untyped_storage() for x in tensors]
        spans = {(x.data_ptr(), x.data_ptr() + x.nbytes()) for x in storages if x.nbytes()}
        spans |= {(x.ctypes.data, x.ctypes.data + x.nbytes) for x in self._arrays}
        return [number for span in sorted(spans) for number in span] or [0, 0]

    def _told(self, kernel: str, line: int, message: str) -> str:
        text = self._lines[line - 1].strip() if line > 0 else ""
        return f"{kernel}: {message} at line {line}, {self._unit.source.get(line, '')}: {text}"


def _check(grid: Sequence[int], block: Sequence[int], dynamic_shared: int) -> None:
    """Refuse what a device refuses to launch; a grid of no programs is left to the machine."""
    if len(grid) > 3 or not all(0 <= n <= most for n, most in zip(grid, MOST_PROGRAMS)):
        raise ValueError(f"grid must be at most {MOST_PROGRAMS}, got {tuple(grid)}")
    if len(block) > 3 or min(block) < 1 or math.prod(block) > MOST_THREADS:
        raise ValueError(f"block must be 1 to {MOST_THREADS} threads, got {tuple(block)}")
    if not 0 <= dynamic_shared <= MOST_SHARED:
        raise ValueError(f"dynamic_shared must be 0 to {MOST_SHARED}, got {dynamic_shared}")


def _tensors(arguments: Sequence[Argument]) -> list[Tensor]:
    """The tensors among the arguments, and those of their maps."""
    tensors = [x.tensor if isinstance(x, TensorMap) else x for x in arguments]
    return [x for x in tensors if isinstance(x, Tensor)]


def _turned(numbers: Sequence[int], count: int) -> list[int]:
    """The last one first, and zeros behind the first."""
    return [*reversed(numbers), *[0] * (count - len(numbers))]


def _memory(x: Tensor) -> Tensor:
    """All bytes of the storage under a tensor."""
    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(x.untyped_storage())


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _bytes(value: Argument, size: int) -> bytes:
    if isinstance(value, Tensor):
        return value.data_ptr().to_bytes(8, "little")
    if isinstance(value, TensorMap):
        return value.pack()
    if isinstance(value, bytes):
        if len(value) != size:
            raise ValueError(f"a struct must be {size} bytes, got {len(value)}")
        return value
    if isinstance(value, float):
        return struct.pack({4: "<f", 8: "<d"}[size], value)
    return (int(value) & (1 << 8 * size) - 1).to_bytes(size, "little")


__all__ = ["ORDERS", "Fault", "Module", "TensorMap", "Unsupported"]
