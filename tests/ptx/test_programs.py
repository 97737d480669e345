# ruff: noqa: ANN001, ANN201  # jit functions
"""The emulator on programs that everybody knows: what they move, scan, count and reduce."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from ptx import Fault, emulated

pytestmark = pytest.mark.costly
Run = Callable[..., Tensor]


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + tl.load(y_ptr + offs, mask=offs < n), mask=offs < n)


@triton.jit
def row_kernel(x_ptr, out_ptr, n, stride, OP: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: a function of the row of its length, or one number in the first place."""
    row, offs = tl.program_id(0), tl.arange(0, BLOCK)
    mask = offs < n
    lowest = float("-inf") if x_ptr.dtype.element_ty.is_floating() else -(2**31)
    x = tl.load(x_ptr + row * stride + offs, mask=mask, other=lowest)
    filled = tl.where(mask, x, 0)
    out = out_ptr + row * stride
    if OP == "softmax":
        e = tl.exp(x - tl.max(x, axis=0))
        tl.store(out + offs, e / tl.sum(e, axis=0), mask=mask)
    elif OP == "cumsum":
        tl.store(out + offs, tl.cumsum(filled, axis=0), mask=mask)
    elif OP == "reversed cumsum":
        tl.store(out + offs, tl.cumsum(filled, axis=0, reverse=True), mask=mask)
    elif OP == "sort":
        tl.store(out + BLOCK - 1 - offs, tl.sort(x), mask=BLOCK - 1 - offs < n)
    elif OP == "gather":
        tl.store(out + offs, tl.gather(x, (offs * 7 + 3) % n, axis=0), mask=mask)
    else:
        if OP == "sum":
            number = tl.sum(filled, axis=0)
        elif OP == "max":
            number = tl.max(x, axis=0)
        elif OP == "min":
            number = tl.min(tl.where(mask, -x, 1000), axis=0)
        elif OP == "argmax":
            number = tl.argmax(x, axis=0)
        elif OP == "argmin":
            number = tl.argmin(-x, axis=0)
        elif OP == "xor":
            number = tl.xor_sum(filled, axis=0)
        tl.store(out, number)


@triton.jit
def tile_kernel(x_ptr, rows_ptr, columns_ptr, M: tl.constexpr, N: tl.constexpr):
    """Sums over either axis of a tile, and the tile turned by way of another layout."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    x = tl.load(x_ptr + m[:, None] * N + n[None, :])
    tl.store(rows_ptr + m, tl.sum(x, axis=1))
    tl.store(columns_ptr + n, tl.max(tl.trans(x), axis=1))


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, n, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """Each program counts in shared memory and adds what it found to the others'."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), tl.histogram(x, BINS, mask=offs < n))


@triton.jit
def atomics_kernel(x_ptr, out_ptr, seen_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, mask = tl.load(x_ptr + offs, mask=offs < n, other=0), offs < n
    slots = offs * 0
    tl.atomic_max(out_ptr + slots, x, mask=mask)
    tl.atomic_min(out_ptr + 1 + slots, x, mask=mask)
    tl.atomic_xor(out_ptr + 2 + slots, x, mask=mask)
    tl.atomic_or(out_ptr + 3 + slots, x, mask=mask)
    tl.atomic_and(out_ptr + 4 + slots, x, mask=mask)
    before = tl.atomic_add(out_ptr + 5 + slots, 1, mask=mask)
    tl.store(seen_ptr + before, 1, mask=mask)
    tl.atomic_cas(out_ptr + 6 + offs, offs, x)


def row(op: str, x: Tensor, run: Run, dtype: torch.dtype | None = None, **options: int) -> Tensor:
    """row_kernel on the rows of a matrix, one program each."""
    rows, n = x.shape
    block = triton.next_power_of_2(n)

    def launch() -> Tensor:
        out = torch.full_like(x, 77, dtype=dtype or x.dtype)
        row_kernel[(rows,)](x, out, n, x.stride(0), OP=op, BLOCK=block, **options)
        return out

    return run(launch)


@pytest.mark.parametrize("n", [1, 255, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bfloat16], ids=str)
def test_vector_add(n: int, dtype: torch.dtype, same_in_every_order: Run) -> None:
    """With a masked tail: neither read nor written."""
    x, y = (torch.randint(-100, 100, (n,)).to(dtype) for _ in range(2))

    def launch() -> Tensor:
        out = torch.full((n + 32,), 77).to(dtype)
        add_kernel[(-(-n // 512),)](x, y, out, n, BLOCK=512)
        return out

    out = same_in_every_order(launch)
    assert torch.equal(out[:n], x + y)
    assert (out[n:] == 77).all()


def test_softmax(same_in_every_order: Run) -> None:
    x = torch.randn(3, 77) * 5
    exact = x.double().softmax(1)
    for harsh in (False, True):
        out = row(
            "softmax", x, lambda launch, harsh=harsh: same_in_every_order(launch, harsh=harsh)
        )
        # An exponential of 2 units off of an argument rounded thrice, 77 sums, a quotient.
        bound = (2 + 4 * 40 + 7 + 3) * 2**-24 * exact
        assert ((out - exact).abs() <= bound).all()
    assert not torch.equal(out, row("softmax", x + 1e-5, same_in_every_order))


@pytest.mark.parametrize("n", [5, 77, 1024])
@pytest.mark.parametrize("op", ["cumsum", "reversed cumsum", "sum", "max", "min", "xor", "sort"])
def test_scans_and_reductions(op: str, n: int, same_in_every_order: Run) -> None:
    """Integers, whose order of summation leaves no trace."""
    x = torch.randint(-1000, 1000, (2, n), dtype=torch.int32)
    out = row(op, x, same_in_every_order)
    expected = {
        "cumsum": lambda: x.cumsum(1),
        "reversed cumsum": lambda: x.flip(1).cumsum(1).flip(1),
        "sort": lambda: x.sort(1, descending=True)[0],
        "sum": lambda: x.sum(1, keepdim=True),
        "max": lambda: x.amax(1, keepdim=True),
        "min": lambda: (-x).amin(1, keepdim=True),
        "xor": lambda: torch.tensor([[_xor(line)] for line in x.tolist()]),
    }[op]().int()
    assert torch.equal(out[:, : expected.shape[1]], expected)
    assert (out[:, expected.shape[1] :] == 77).all()


def _xor(numbers: list[int]) -> int:
    total = 0
    for number in numbers:
        total ^= number
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("op", ["sum", "cumsum", "max"])
def test_reductions_of_floats(op: str, dtype: torch.dtype, same_in_every_order: Run) -> None:
    """Multiples of one power of two, whose sums are exact."""
    x = (torch.randint(-64, 64, (2, 130)) / 8).to(dtype)
    out = row(op, x, same_in_every_order)
    expected = getattr(x.double(), {"max": "amax"}.get(op, op))(1).to(dtype).view(2, -1)
    assert torch.equal(out[:, : expected.shape[1]], expected)


@pytest.mark.parametrize("warps", [1, 4, 8])
@pytest.mark.parametrize("op", ["argmax", "argmin"])
def test_argmax(op: str, warps: int, same_in_every_order: Run) -> None:
    """The first of equals, across lanes, warps and registers."""
    x = torch.randint(0, 9, (4, 700)).float()
    x[0, 3:] = 9
    out = row(op, x, same_in_every_order, torch.int32, num_warps=warps)
    expected = [line.index(max(line)) for line in x.tolist()]
    assert out[:, 0].tolist() == expected


@pytest.mark.parametrize("n", [77, 600])
def test_gather(n: int, same_in_every_order: Run) -> None:
    x = torch.randn(2, n)
    assert torch.equal(row("gather", x, same_in_every_order), x[:, (torch.arange(n) * 7 + 3) % n])


@pytest.mark.parametrize("shape", [(16, 16), (64, 32), (8, 256)])
def test_tiles(shape: tuple[int, int], same_in_every_order: Run) -> None:
    x = torch.randint(-9, 9, shape).float()

    def launch() -> Tensor:
        rows, columns = x.new_full(shape[:1], torch.nan), x.new_full(shape[1:], torch.nan)
        tile_kernel[(1,)](x, rows, columns, M=shape[0], N=shape[1])
        return torch.cat([rows, columns])

    assert torch.equal(same_in_every_order(launch), torch.cat([x.sum(1), x.amax(0)]))


def test_histogram(same_in_every_order: Run) -> None:
    x = torch.randint(0, 32, (1500,), dtype=torch.int32)

    def launch() -> Tensor:
        counts = torch.zeros(32, dtype=torch.int32)
        histogram_kernel[(3,)](x, counts, len(x), BINS=32, BLOCK=512)
        return counts

    assert torch.equal(same_in_every_order(launch), x.bincount(minlength=32).int())


def test_atomics(same_in_every_order: Run) -> None:
    """Each by every lane, and what an addition found there before it is a permutation."""
    x = torch.randint(-(2**31), 2**31, (300,), dtype=torch.int32)
    start = [-5, 5, 0, 0, -1, 0]

    def launch() -> Tensor:
        out = torch.cat([torch.tensor(start), torch.arange(512) // 2 * 2]).int()
        seen = torch.zeros(300, dtype=torch.int32)
        atomics_kernel[(2,)](x, out, seen, 300, BLOCK=256)
        return torch.cat([out, seen])

    out, numbers = same_in_every_order(launch), x.tolist()
    every, some = -1, 0
    for number in numbers:
        every, some = every & number, some | number
    expected = [max(-5, *numbers), min(5, *numbers), _xor(numbers), some, every, 300]
    assert out[:6].tolist() == expected
    swapped = torch.cat([x, torch.zeros(212, dtype=torch.int32)])
    odd = torch.arange(512) % 2 == 1
    assert torch.equal(out[6:518], torch.where(odd, torch.arange(512) - 1, swapped).int())
    assert (out[518:] == 1).all()


@triton.jit
def add_to_one(x_ptr, sum_ptr):
    tl.atomic_add(sum_ptr, tl.load(x_ptr + tl.program_id(0)))


def test_a_result_that_depends_on_the_order_is_a_fault(target: str) -> None:
    """Sums of floats by atomics: no race, and yet not the same bits in each order."""
    numbers = torch.tensor([1.0, 2.0**30, 3.0, -(2.0**30)], dtype=torch.float32, device="cpu")
    with emulated(target, order="each"):
        add_to_one[(4,)](numbers.abs(), total := numbers.new_zeros(1))
        with pytest.raises(Fault, match="the result of backward order is not that of forward"):
            add_to_one[(4,)](numbers, numbers.new_zeros(1))
    assert total.item() == 2.0**31
