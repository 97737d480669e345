# ruff: noqa: ANN001, ANN201  # jit functions
"""The emulator on matrix products: every operand's type and order in memory, pipelines, layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl

Run = Callable[..., Tensor]


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    c_ptr,
    K,
    a_strides,
    b_strides,
    c_stride,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile of c = a b, in float32, from as many pipelined steps as K has blocks."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + m[:, None] * a_strides[0] + k[None, :] * a_strides[1]
    b_ptrs = b_ptr + k[:, None] * b_strides[0] + n[None, :] * b_strides[1]
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=k[None, :] < K - first, other=0.0)
        b = tl.load(b_ptrs, mask=k[:, None] < K - first, other=0.0)
        c = tl.dot(a, b, c, input_precision=PRECISION)
        a_ptrs += BLOCK_K * a_strides[1]
        b_ptrs += BLOCK_K * b_strides[0]
    tl.store(c_ptr + m[:, None] * c_stride + n[None, :], c)


@triton.jit
def chain_kernel(a_ptr, b_ptr, d_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """(a bT) d, the first product an operand of the second where it lies in registers."""
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    b = tl.load(b_ptr + n[:, None] * K + k[None, :])
    d = tl.load(d_ptr + n[:, None] * K + k[None, :])
    p = tl.dot(a, tl.trans(b)).to(a.dtype)
    tl.store(out_ptr + m[:, None] * K + k[None, :], tl.dot(p, d))


# Rows, columns and inner columns of a tile, and the warps that share it.
TILES = (
    (16, 16, 16, 4),
    (64, 32, 32, 4),
    (128, 64, 64, 8),
    (64, 128, 32, 4),
    (32, 64, 64, 8),
    (128, 16, 32, 8),
    (64, 64, 16, 4),
    (16, 128, 64, 4),
)
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "tf32": torch.float32,
    "ieee": torch.float32,
}


@dataclass(frozen=True)
class Product:
    """A product of two matrices as a kernel is compiled for it."""

    dtype: str
    orders: str  # of a and of b in memory: n as rows, t as columns
    tile: tuple[int, int, int, int]
    stages: int

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.tile[:3]))
        return f"{self.dtype}-{self.orders}-{sizes}-{self.tile[3]}w-{self.stages}s"


def products() -> list[Product]:
    """All types and orders, each four times in other tiles and stages."""
    found = []
    for i, (dtype, orders) in enumerate(product(DTYPES, ("nn", "nt", "tn", "tt"))):
        for stages in range(1, 5):
            found.append(Product(dtype, orders, TILES[(3 * i + 2 * stages + i // 8) % 8], stages))
    return found


def operands(case: Product, whole: bool) -> tuple[Tensor, Tensor]:
    """Matrices of two tiles of rows and three and a half of inner columns."""
    rows, columns, inner, _ = case.tile
    sizes = [(2 * rows, 3 * inner + inner // 2), (3 * inner + inner // 2, columns)]
    found = []
    for size, order in zip(sizes, case.orders):
        x = torch.randint(-8, 9, size).double() if whole else torch.randn(size).double()
        x = x.to(DTYPES[case.dtype])
        found.append(x if order == "n" else x.t().contiguous().t())
    return found[0], found[1]


def multiply(case: Product, a: Tensor, b: Tensor) -> Tensor:
    rows, columns, inner, warps = case.tile
    c = torch.full((len(a), b.shape[1]), torch.nan)
    matmul_kernel[(len(a) // rows, b.shape[1] // columns)](
        a,
        b,
        c,
        a.shape[1],
        a.stride(),
        b.stride(),
        c.stride(0),
        PRECISION="tf32" if case.dtype == "tf32" else "ieee",
        BLOCK_M=rows,
        BLOCK_N=columns,
        BLOCK_K=inner,
        num_warps=warps,
        num_stages=case.stages,
    )
    return c


def cut(x: Tensor, dtype: str) -> Tensor:
    """The values that the tensor cores see: tf32 has the first 10 bits of a mantissa."""
    if dtype == "tf32":
        x = (x.view(torch.int32) & -(1 << 13)).view(torch.float32)
    return x.double()


def allowed(a: Tensor, b: Tensor) -> Tensor:
    """How far sums in float32 are from float64's: products are exact in it, or rounded once with
    their sum; each of at most K sums is cut to 24 bits, by at most 2^-23 of all products' sizes.
    """
    return a.shape[1] * 2.0**-23 * (a.abs() @ b.abs())


@pytest.mark.costly
@pytest.mark.parametrize("case", products(), ids=str)
def test_products(case: Product, same_in_every_order: Run) -> None:
    whole = operands(case, whole=True)
    found = same_in_every_order(lambda: multiply(case, *whole))
    assert torch.equal(found.double(), whole[0].double() @ whole[1].double())
    a, b = operands(case, whole=False)
    seen = cut(a, case.dtype), cut(b, case.dtype)
    exact = seen[0] @ seen[1]
    for harsh in (False, True):
        found = same_in_every_order(lambda: multiply(case, a, b), harsh=harsh)
        assert ((found - exact).abs() <= allowed(*seen)).all()


def test_the_bound_can_fail() -> None:
    """One operand's last bit is more than it allows, and rounded tf32 in the place of cut one."""
    a, b = torch.randn(32, 64).bfloat16(), torch.randn(64, 16).bfloat16()
    exact, bound = a.double() @ b.double(), allowed(a.double(), b.double())
    changed = a.view(torch.int16)
    changed[5, 7] ^= 1
    assert (((a.double() @ b.double()) - exact).abs() > bound).any()
    a, b = torch.randn(32, 64), torch.randn(64, 16)
    seen = cut(a, "tf32"), cut(b, "tf32")
    assert ((a.double() @ b.double() - seen[0] @ seen[1]).abs() > allowed(*seen)).any()


@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("shape", [(64, 64, 32), (128, 32, 64), (32, 128, 16)], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_product_of_a_product(
    dtype: str, shape: tuple[int, int, int], warps: int, same_in_every_order: Run
) -> None:
    m, n, k = shape
    sizes = (m, k), (n, k), (n, k)
    a, b, d = (torch.randint(-1, 2, size).to(DTYPES[dtype]) for size in sizes)

    def launch() -> Tensor:
        out = torch.full((m, k), torch.nan)
        chain_kernel[(1,)](a, b, d, out, M=m, N=n, K=k, num_warps=warps)
        return out

    expected = (a.double() @ b.double().t()) @ d.double()
    assert torch.equal(same_in_every_order(launch).double(), expected)
