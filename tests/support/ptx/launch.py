"""Triton's launches, emulated: kernels are compiled for a target and run on tensors of the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .module import Argument, Module, TensorMap, Unsupported

TARGETS = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
modules: dict[str, Module] = {}  # by their PTX


@dataclass(frozen=True)
class Run:
    """A launch that has been emulated."""

    kernel: str
    executed: int  # instructions of warps
    ptx: str


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
def emulated(
    target: str,
    order: str = "forward",
    harsh: bool = False,
    seed: int = 0,
    edit: Callable[[str], str] | None = None,
) -> Iterator[list[Run]]:
    """Every launch in its body is emulated, its PTX edited first; raises Fault. With the order
    "each" every launch runs in all of them, and must give the same bits.
    """
    from dense_attn._backends import plans
    from dense_attn.triton_kernels import configs  # whose package reads the environment

    runs: list[Run] = []
    compile_kernel = JITFunction.run

    def run(
        self: JITFunction, *args: object, grid: object, warmup: bool, **kwargs: object
    ) -> object:
        kernel = compile_kernel(self, *args, grid=grid, warmup=True, **kwargs)
        if warmup:
            return kernel
        bound = self.device_caches[TARGETS[target]][4](*args, **kwargs)[0]
        sizes = grid(bound) if callable(grid) else grid
        text = kernel.asm["ptx"] if edit is None else edit(kernel.asm["ptx"])
        if text not in modules:
            modules[text] = Module(text)
        module = modules[text]
        before = module.executed
        maps = getattr(kernel.metadata, "tensordesc_meta", None)
        given = (
            kernel.metadata.name,
            [*arguments(kernel.src.signature, bound, maps), _scratch(kernel.metadata, sizes), 0],
            sizes,
            (32 * kernel.metadata.num_warps,),
            kernel.metadata.shared,
        )
        if order == "each":
            module.launch_in_every_order(*given, harsh=harsh, seed=seed)
        else:
            module.launch(*given, order=order, harsh=harsh, seed=seed)
        runs.append(Run(kernel.metadata.name, module.executed - before, text))
        return kernel

    plans.forget()  # they are of another architecture
    with ExitStack() as patches:
        patches.callback(plans.forget)
        patches.enter_context(mock.patch.object(driver, "_active", _Driver(TARGETS[target])))
        patches.enter_context(mock.patch.object(JITFunction, "run", run))
        patches.enter_context(mock.patch.object(configs, "architecture", constant(target)))
        yield runs


def constant(target: str) -> Callable[[object], str]:
    """The answer for every device, which torch.compile takes as it is."""
    return torch.compiler.assume_constant_result(lambda device: target)


def arguments(
    signature: dict[str, object], bound: dict[str, object], maps: Sequence[dict] | None = None
) -> list[Argument]:
    """The arguments that a kernel takes at run time, tuples flattened, tensor descriptors as maps
    where the compiler says how their boxes lie in memory.
    """
    found: list[Argument] = []
    left = iter(maps or ())

    def walk(kind: object, value: object) -> None:
        if isinstance(kind, (tuple, list)):
            for one_kind, one in zip(kind, value, strict=True):
                walk(one_kind, one)
        elif isinstance(value, TensorDescriptor):
            found.extend(_described(value, next(left, None)))
        elif kind != "constexpr":
            is_float = isinstance(kind, str) and kind.startswith("fp")
            found.append(float(value) if is_float else value)

    for name, kind in signature.items():
        walk(kind, bound[name])
    return found


def _described(x: TensorDescriptor, box: dict | None) -> list[Argument]:
    """A descriptor as Triton's launcher hands it over."""
    sizes = [*x.shape, *x.strides]
    if box is None:  # the kernel takes it apart
        rounds = [x.round_f32_to_tf32] if hasattr(x, "round_f32_to_tf32") else []
        return [x.base, *sizes, x.padding == "nan", *rounds, *sizes]
    if box["fp4_padded"] or box.get("is_im2col") or getattr(x, "round_f32_to_tf32", False):
        raise Unsupported(f"a tensor map of {box}")
    strides = [box["elem_size"] * stride for stride in x.strides]
    how = (box["elem_type"], x.shape, strides, box["block_size"], box["swizzle"])
    return [TensorMap(x.base, *how, int(x.padding == "nan")), *sizes]


def _scratch(metadata: object, grid: Sequence[int]) -> Tensor | int:
    """The memory that a launch's programs make tensor maps in, 0 for none."""
    size = metadata.global_scratch_size * math.prod(grid)
    align = metadata.global_scratch_align
    if not size:
        return 0
    memory = torch.zeros(size + align, dtype=torch.uint8, device="cpu")
    return memory[-memory.data_ptr() % align :]
