"""The rule of accuracy, and the verdict on a backend by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends import table

DTYPES = _checks.DTYPES
_LONGEST = 400  # characters of an error that are shown


def judge(got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The one rule of accuracy: a kernel is right when error <= allowed, the two numbers returned.

    error = max|got - exact|, allowed = 2*max|plain - exact| + eps(dtype)*max|exact|, where exact is
    the reference in float64 and plain the reference in the dtype under test. The reference in
    float64 is no more exact than plain is there, so for float64 its own error counts once more: 3
    for 2. Where exact is infinite or NaN, got must be the same, or the error is infinite; where
    plain alone overflows it allows nothing.
    """
    got, exact, plain = got.double(), exact.double(), plain.double()
    finite = exact.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=-1.0), exact[~finite].nan_to_num(nan=-1.0)):
        return float("inf"), 0.0
    error = _largest(got[finite] - exact[finite])
    plain_error = (plain - exact)[finite & plain.isfinite()]
    times = 3 if dtype == torch.float64 else 2
    return error, times * _largest(plain_error) + torch.finfo(dtype).eps * _largest(exact[finite])


def ratio(got: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> float:
    """error / allowed, right when at most 1."""
    error, allowed = judge(got, exact, plain, dtype)
    return error / allowed if allowed > 0 else (0.0 if error == 0 else float("inf"))


def further(a: Tensor, b: Tensor, exact: Tensor) -> Tensor:
    """The elements of a and b that lie further from the exact ones."""
    return torch.where((b - exact).abs() > (a - exact).abs(), b, a)


def differing(a: Tensor, b: Tensor) -> int:
    """How many elements are not the same bits, NaN being NaN."""
    return int((~((a == b) | (a.isnan() & b.isnan()))).sum())


def _largest(x: Tensor) -> float:
    return 0.0 if x.numel() == 0 else x.abs().max().nan_to_num(nan=float("inf")).item()


@dataclass(frozen=True)
class Verdict:
    """One row: numbers that must not exceed their limit, and a control that must exceed it."""

    backend: str
    dtype: str
    what: str
    numbers: dict[str, float]  # elements that differ, or error / allowed
    control: float  # such a number of a result that is wrong on purpose
    limit: float = 1  # of the numbers; 0 for elements that differ
    worst: str = ""  # what is furthest off, and by how much
    error: str = ""  # what the backend raised instead of results

    @property
    def passed(self) -> bool:
        """Whether the backend is right, and its control wrong."""
        return not self.error and max(self.numbers.values()) <= self.limit < self.control

    @property
    def fault(self) -> str:
        """The words behind FAILED."""
        return self.error or self.worst


def raised(backend: str, dtype: torch.dtype, what: str, error: Exception, by: str = "") -> Verdict:
    """The verdict on a backend that raised."""
    words = " ".join(str(error).split())[:_LONGEST]
    said = f"{by}{type(error).__name__}: {words}"
    return Verdict(backend, _checks.name(dtype), what, {}, nan, error=said)


def attempt(
    make: Callable[..., Verdict], backend: str, dtype: torch.dtype, what: str, *arguments: object
) -> Verdict:
    """The verdict that is made, or that on a backend that raises: its row fails, whatever it was,
    and the others are still checked.
    """
    try:
        return make(backend, dtype, what, *arguments)
    except Exception as error:
        return raised(backend, dtype, what, error)


def why_not(
    backend: str, op: str, dtype: torch.dtype = torch.float32, head_dim: int = 8
) -> list[str]:
    """Why a backend cannot be checked here on tensors of its own device."""
    device, reason = table.device_of(backend), table.unavailable(backend, op)
    if reason:
        return [reason]
    return table.why_not(backend, op, torch.empty(1, 1, 1, head_dim, dtype=dtype, device=device))


def usable(op: str, dtype: torch.dtype, among: Sequence[str]) -> list[str]:
    """The backends among these that run an op in a dtype on this machine."""
    return [name for name in among if not why_not(name, op, dtype)]


def randn(generator: torch.Generator, *shape: int) -> Tensor:
    """Random numbers in float64, on the CPU."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def call(backend: str, op: str, *arguments: object, **named: object) -> tuple[Tensor, ...]:
    """Results of a backend's kernel on tensors of its device, on the CPU."""
    device = table.device_of(backend)
    there = [x.to(device) if isinstance(x, Tensor) else x for x in arguments]
    named = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
    results = getattr(table.NAMESPACES[backend], op)(*there, **named)
    return tuple(x.cpu() for x in ((results,) if isinstance(results, Tensor) else results))
