"""Triton kernels compiled for devices that are not here, and what the compiler made of them.

The launchers run as they are, on tensors without memory; a driver that has only a target takes the
place of the device's, and every launch ends when its kernel is compiled.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels.sega import selection

from . import occupancy

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMITS = {  # bytes a program
    "sm_80": 99 << 10,  # 8.6, 8.9 and 12.0, which take these tiles too; 8.0 has 163 KB
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "gfx942": 64 << 10,
}
MATRIX = re.compile(r"\b(tcgen05\.mma|wgmma\.mma_async|mma\.sync|v_mfma)")
FUSED = re.compile(r"\bfma\.|\bv_(?:pk_)?fmac?_")
# NVIDIA's plain division of float32 is not rounded to nearest; gfx942 makes an exact quotient of
# fused steps.
DIVISIONS = re.compile(r"\b(div\.full|v_div_fmas)")


@dataclass(frozen=True)
class Launch:
    """A kernel that a launcher launched, compiled."""

    kernel: str
    constants: dict[str, object]  # what it was compiled for
    warps: int
    stages: int
    registers: int  # a thread
    spills: int  # bytes a thread, of what registers do not hold
    shared: int  # bytes a program
    matrix: dict[str, int]  # instructions of the matrix units by kind
    fused: int  # multiply-adds
    divisions: dict[str, int]  # instructions by kind
    assembly: str = field(repr=False)  # PTX, or that of gfx942
    binary: bytes = field(repr=False)


class _Driver:
    """The answers to what a launch asks of a device before its kernel is compiled."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> GPUTarget:
        return self._target

    def get_current_stream(self, device: GPUTarget) -> None:
        return None


@contextmanager
def compiled(target: str) -> Iterator[list[Launch]]:
    """Collects the kernels launched in its body, each once for each of its specialisations."""
    launches: list[Launch] = []
    known: set[int] = set()
    run = JITFunction.run

    def compile_alone(
        self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object
    ) -> CompiledKernel:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in known:
            known.add(id(kernel))
            constants = {name: kwargs[name] for name in self.arg_names if name in kwargs}
            launches.append(_launch(target, kernel, constants))
        return kernel

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(driver, "_active", _Driver(TARGETS[target])))
        patches.enter_context(mock.patch.object(JITFunction, "run", compile_alone))
        patches.enter_context(mock.patch.object(configs, "architecture", return_value=target))
        processors = occupancy.DEVICES[target].processors
        patches.enter_context(mock.patch.object(configs, "processors", return_value=processors))
        patches.enter_context(mock.patch.object(selection, "WARP_SIZE", TARGETS[target].warp_size))
        yield launches


def _launch(target: str, kernel: CompiledKernel, constants: dict[str, object]) -> Launch:
    metadata = kernel.metadata
    if TARGETS[target].backend == "cuda":
        assembly, binary = kernel.asm["ptx"], kernel.asm["cubin"]
        registers, spills = _cuda_usage(binary, metadata.name)
    else:
        assembly, binary = kernel.asm["amdgcn"], kernel.asm["hsaco"]
        registers = _number(r"\.vgpr_count:\s*(\d+)", assembly)
        spills = _number(r"\.private_segment_fixed_size:\s*(\d+)", assembly)
    return Launch(
        metadata.name,
        constants,
        metadata.num_warps,
        metadata.num_stages,
        registers,
        spills,
        metadata.shared,
        _count(MATRIX, assembly),
        len(FUSED.findall(assembly)),
        _count(DIVISIONS, assembly),
        assembly,
        binary,
    )


def _count(pattern: re.Pattern, text: str) -> dict[str, int]:
    """How often each of a pattern's finds is in the text."""
    return dict(sorted(Counter(pattern.findall(text)).items()))


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in the assembly"
    return int(found.group(1))


@cache
def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def inspect(cubin: bytes, option: str, tool: str = "cuobjdump") -> str:
    """The words of one of Triton's own tools on a binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return look_into(file.name, option, tool=tool)


def look_into(
    path: str | Path, *options: str, tool: str = "cuobjdump", cwd: str | None = None
) -> str:
    """The words of one of Triton's own tools on a file."""
    command = [_tool(tool), *options, str(path)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout


def _cuda_usage(cubin: bytes, name: str) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread that hold what does not fit them)."""
    usage = inspect(cubin, "--dump-resource-usage")
    usage = usage[usage.index(name) :]
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(
        r"LOCAL:(\d+)", usage
    )
