# ruff: noqa: ANN001, ANN201  # jit functions
"""The emulator on kernels whose warps part: some copy boxes of tensors, others multiply them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from ptx import Fault, emulated
from ptx.mutations import kernels, mutants
from triton.tools.tensor_descriptor import TensorDescriptor

ORDERS = ("forward", "backward", "random")
OLDEST = Path(__file__).resolve().parents[2] / ".venv" / "triton-3.6.0"


@triton.jit
def matmul_kernel(
    a_ptr, b, c_ptr, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A tile of c = a bT; the maps of a and of c are the kernel's own, b's is its launch's."""
    m, n = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    a = tl.make_tensor_descriptor(a_ptr, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    c = tl.make_tensor_descriptor(c_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, K, BLOCK_K, warp_specialize=True):
        total = tl.dot(a.load([m, k]), b.load([n, k]).T, total, input_precision="tf32")
    c.store([m, n], total.to(c_ptr.dtype.element_ty))


@triton.jit
def listed_kernel(
    q_ptr, k, v, tiles_ptr, counts_ptr, out_ptr, seqlen, BLOCK_M: tl.constexpr, D: tl.constexpr
):
    """The sum of exp2(q kT) v over a list of tiles of 64 keys, and half of exp2(-q kT) v over
    another. Triton parts no warps where q is the same for both.
    """
    program = tl.program_id(0)
    m, d = program * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    at = m[:, None] * D + d[None, :]
    q = -tl.load(q_ptr + at, mask=m[:, None] < seqlen, other=0.0)
    before = tl.zeros((BLOCK_M, D), tl.float32)
    total = tl.zeros((BLOCK_M, D), tl.float32)
    for phase in tl.range(0, 2):
        q, before = -q, total
        total = tl.zeros((BLOCK_M, D), tl.float32)
        count = tl.load(counts_ptr + 2 * program + phase)
        for place in tl.range(0, count, warp_specialize=True):
            first = tl.load(tiles_ptr + place) * 64
            weights = tl.exp2(tl.dot(q, k.load([first, 0]).T))
            total = tl.dot(weights.to(q.dtype), v.load([first, 0]), total)
    tl.store(out_ptr + at, before + 0.5 * total, mask=m[:, None] < seqlen)


def multiply(a: Tensor, b: Tensor, tile: tuple[int, int, int], warps: int) -> Tensor:
    c = torch.full((len(a), len(b)), torch.nan, dtype=a.dtype)
    rows, columns, inner = tile
    grid = (triton.cdiv(len(a), rows), triton.cdiv(len(b), columns))
    b = TensorDescriptor.from_tensor(b, [columns, inner])
    matmul_kernel[grid](a, b, c, *c.shape, a.shape[1], *tile, num_warps=warps, num_stages=3)
    return c


TILES = {  # by the bytes of a row of a box, which say how they are swizzled
    "two-groups-128": ((128, 64, 64), 4, torch.float16),
    "two-groups-64": ((128, 32, 32), 4, torch.bfloat16),
    "two-groups-32": ((128, 64, 16), 4, torch.float16),
    "twice-the-same": ((64, 64, 64), 4, torch.float16),
    "not-parted": ((128, 64, 64), 8, torch.bfloat16),
    "tf32": ((128, 64, 32), 4, torch.float32),
}


@pytest.mark.parametrize("case", TILES)
def test_products(case: str) -> None:
    """Sizes that no tile divides: what lies outside is read as zeros, and not written."""
    tile, warps, dtype = TILES[case]
    torch.manual_seed(0)
    a, b = (torch.randint(-4, 5, (n, 104)).to(dtype) for n in (200, 88))
    for order in ORDERS:
        with emulated("sm_90", order=order) as runs:
            c = multiply(a, b, tile, warps)
        assert torch.equal(c.double(), (a.double() @ b.double().t()).to(dtype).double()), order
        assert ("setmaxnreg" in runs[0].ptx) == (case != "not-parted")


def listed() -> tuple[Callable[[], Tensor], Tensor]:
    """(a launch, its exact results): no tiles, one, and as many as the buffers take twice."""
    torch.manual_seed(0)
    q, k, v = ((torch.randn(n, 64) / 4).half() for n in (200, 300, 300))
    tiles = torch.tensor([2, 0, 4, 1, 3, 2, 2], dtype=torch.int32)
    counts = torch.tensor([[7, 0], [1, 4]], dtype=torch.int32)

    def launch() -> Tensor:
        out = torch.full((200, 64), torch.nan)
        boxes = (TensorDescriptor.from_tensor(x, [64, 64]) for x in (k, v))
        how = {"BLOCK_M": 128, "D": 64, "num_warps": 4, "num_stages": 3}
        listed_kernel[(2,)](q, *boxes, tiles, counts, out, 200, **how)
        return out

    exact = []
    for rows, (whole, half) in zip(q.double().split(128), counts.tolist()):
        total = torch.zeros(len(rows), 64, dtype=torch.float64)
        for sign, factor, count in ((1, 1.0, whole), (-1, 0.5, half)):
            for tile in tiles[:count].tolist():
                keys, values = (x.double()[64 * tile : 64 * tile + 64] for x in (k, v))
                weights = torch.nn.functional.pad(
                    sign * rows @ keys.t(), (0, 64 - len(keys))
                ).exp2()
                total += (
                    factor * weights @ torch.nn.functional.pad(values, (0, 0, 0, 64 - len(keys)))
                )
        exact.append(total)
    return launch, torch.cat(exact)


def test_lists_of_tiles() -> None:
    launch, exact = listed()
    results = []
    for order in ORDERS:
        with emulated("sm_90", order=order, harsh=True):
            results.append(launch())
    assert (results[0] - exact).abs().max() <= 2e-3 * exact.abs().max()
    for order, result in zip(ORDERS, results):
        assert torch.equal(result, results[0]), order


KINDS = ("phase wait", "arrival")


def test_every_wait_and_arrival_is_needed() -> None:
    launch, _ = listed()
    (kernel,) = kernels(launch, "sm_90")
    kernel.check()
    gone = [mutant for mutant in mutants(kernel.text) if mutant.kind in KINDS]
    assert {mutant.kind for mutant in gone} == {*KINDS}
    assert [f"{x.place}: {x.was}" for x in gone if not kernel.finds(x)] == []


FAULTS = {
    "one phase too early": (r"(wait\.parity\S* complete, \[\S+\]), %r\d+;", r"\1, 1;"),
    "a box wider than is expected": (r"(expect_tx\S* _, \[\S+\]), 8192;", r"\1, 4096;"),
    "a box narrower than is expected": (r"(expect_tx\S* _, \[\S+\]), 8192;", r"\1, 16384;"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name: str) -> None:
    launch, _ = listed()
    with pytest.raises(Fault), emulated("sm_90", edit=lambda x: re.sub(*FAULTS[name], x, count=1)):
        launch()


def test_a_map_of_the_kernels_own_needs_its_fence() -> None:
    a = torch.ones(128, 64, dtype=torch.float16)
    gone = r"(?m)^.*fence\.proxy\.tensormap.*$"
    says = r"without fence\.proxy\.tensormap"
    with pytest.raises(Fault, match=says), emulated("sm_90", edit=lambda x: re.sub(gone, "", x)):
        multiply(a, a[:64], (128, 64, 64), 4)


@pytest.mark.full
def test_by_the_oldest_triton() -> None:
    if not OLDEST.exists():
        pytest.skip("Triton 3.6.0 is not installed: make test ARGS='-m full' does it")
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-p", "no:xdist", "-m", "not full", __file__],
        env=os.environ | {"PYTHONPATH": str(OLDEST)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
