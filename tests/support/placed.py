"""Kernels of a module on tensors of a backend's device, the CPU's where they are interpreted or
emulated, their results on the CPU.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from dense_attn._backends import ops, triton


def copied(x: Tensor, device: str) -> Tensor:
    """All the memory of x on a device, under x's view of it."""
    if x.device.type == device:
        return x
    if x.is_neg():
        return torch._neg_view(copied(torch._neg_view(x), device))
    storage = x.untyped_storage()
    memory = torch.empty(0, dtype=x.dtype).set_(storage, 0, (storage.nbytes() // x.itemsize,), (1,))
    return memory.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


class Placed:
    """A module whose ops take and give tensors of the CPU; all else of it is as it is."""

    def __init__(self, module: ModuleType, device: str = triton.DEVICE) -> None:
        self._module, self._device = module, device

    def __getattr__(self, name: str) -> object:
        value = getattr(self._module, name)
        return _placed(value, self._device) if name in ops.OPS else value


def _placed(op: object, device: str) -> object:
    def there(x: object) -> object:
        return copied(x, device) if isinstance(x, Tensor) else x

    def call(*arguments: object, **named: object) -> Tensor | tuple[Tensor, ...]:
        named = {name: there(value) for name, value in named.items()}
        results = op(*map(there, arguments), **named)
        return results.cpu() if isinstance(results, Tensor) else tuple(x.cpu() for x in results)

    return call


def same(got: object, expected: object) -> None:
    """Equal bits, shapes and dtypes; one NaN is like another."""
    for one, other in zip(
        *((x,) if isinstance(x, Tensor) else x for x in (got, expected)), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
