"""The dtype and device that a program may have set for tensors that name none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SURROUNDINGS = (*DTYPES, torch.device("cpu"), torch.device("meta"))


@contextmanager
def surrounded(by: torch.dtype | torch.device) -> Iterator[None]:
    """The default dtype, or the default device."""
    before = torch.get_default_dtype()
    if isinstance(by, torch.dtype):
        torch.set_default_dtype(by)
    try:
        if isinstance(by, torch.device):
            with by:
                yield
        else:
            yield
    finally:
        torch.set_default_dtype(before)


def assert_same(got: object, expected: object) -> None:
    """Require equal bits, dtypes and devices, in whatever holds them."""
    if isinstance(expected, Tensor):
        assert (got.dtype, got.device, got.shape) == (
            expected.dtype,
            expected.device,
            expected.shape,
        )
        assert torch.equal(
            got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8)
        )
    elif isinstance(expected, dict):
        assert got.keys() == expected.keys()
        assert_same([*got.values()], [*expected.values()])
    elif isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for pair in zip(got, expected):
            assert_same(*pair)
    elif is_dataclass(expected):
        names = [field.name for field in fields(expected)]
        assert_same(
            [getattr(got, name) for name in names], [getattr(expected, name) for name in names]
        )
    else:
        assert got == expected
