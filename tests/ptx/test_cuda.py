"""The emulator on PTX of nvcc: calls, local arrays, shuffles, votes, switches, float64."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ptx import Module

ORDERS = ("forward", "backward", "random")


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    """The sample as nvcc compiles it."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    text = tmp_path_factory.mktemp("sample") / "sample.ptx"
    source = Path(__file__).with_name("sample.cu")
    subprocess.run(["nvcc", "-ptx", "-arch=sm_80", source, "-o", text], check=True)
    ptx = text.read_text()
    assert "call.uni" in ptx
    assert ".local" in ptx
    return Module(ptx)


def launch(
    module: Module,
    name: str,
    make: Callable[[], list],
    threads: int,
    programs: int = 1,
    **more: int,
) -> list[Tensor]:
    """The arguments after a launch, the same bits in every order."""
    results = []
    for order in ORDERS:
        arguments = make()
        module.launch(name, arguments, (programs, 1, 1), (threads, 1, 1), order=order, **more)
        results.append([x for x in arguments if isinstance(x, Tensor)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            assert torch.equal(a, b)
    return results[0]


def test_calls(module: Module) -> None:
    x = torch.randn(70)

    def make() -> list:
        return [x, torch.full((96,), -7.0, dtype=torch.float64), 70]

    _, out = launch(module, "polynomials", make, 32, programs=3)
    exact = (x.double() - 0.125 * x.double() ** 3 + 1 - 0.5 * x.double() ** 2) / 2
    assert ((out[:70] - exact).abs() <= 4 * 2.0**-24 * (1 + x.abs() + x**2 + x.abs() ** 3)).all()
    assert (out[70:] == -7).all()


def test_local_arrays(module: Module) -> None:
    x = torch.randint(0, 1000, (500,), dtype=torch.int32)
    _, out = launch(
        module, "local_arrays", lambda: [x, torch.zeros(64, dtype=torch.int32), 500], 64
    )
    assert out.tolist() == [_local_arrays(x.tolist(), thread) for thread in range(64)]


def _local_arrays(x: list[int], thread: int) -> int:
    counts, order = [0] * 16, list(range(15, -1, -1))
    for i in range(thread, len(x), 64):
        counts[x[i] & 15] += i
        a, b = x[i] & 15, i & 15
        if order[a] > order[b]:
            order[a], order[b] = order[b], order[a]
    total = 0
    for i in order:
        total = (total * 31 + counts[i]) & 0xFFFFFFFF
    return total - (total >> 31 << 32)


def test_shuffles_and_votes(module: Module) -> None:
    x, threads, n = torch.randint(-50, 50, (96,)).float(), 96, 90

    def make() -> list:
        return [x, torch.zeros(threads), torch.zeros(3, dtype=torch.int32), n]

    _, out, votes = launch(module, "block_sum", make, threads, dynamic_shared=4 * threads)
    x = torch.where(torch.arange(threads) < n, x, 0)
    of_warps = x.view(3, 32).sum(1, keepdim=True)
    lanes = torch.arange(32).float()
    after = of_warps + torch.cat([lanes[1:], lanes[-1:]])
    before = torch.cat([lanes[:2], lanes[:-2]])
    assert torch.equal(out, x.sum() + (after * 0.5 + before).flatten() + x.flip(0))
    thirds = sum(thread % 3 == 0 for thread in range(32, 64))
    assert votes.tolist() == [32 * thirds, 95, 32 | 16 | 8]


def test_switches_and_loops(module: Module) -> None:
    """Lanes that part, in a switch and in a loop, and meet again."""
    x = torch.randint(0, 2**20, (100,), dtype=torch.int32)

    def make() -> list:
        return [x, torch.full((128,), -7, dtype=torch.int32), 100]

    _, out = launch(module, "cases", make, 64, programs=2)
    assert out.tolist() == [*map(_cases, x.tolist()), *[-7] * 28]


def _cases(y: int) -> int:
    bits = f"{y:032b}"
    inverse = f"{~y & 0xFFFFFFFF:032b}"
    found = {
        0: lambda: y * y + 1,
        1: lambda: 32 - y.bit_length(),
        2: lambda: int(bits[::-1], 2),
        3: lambda: (bits.count("1") - 5) ^ 0x5555,
        4: lambda: y ^ 0x5555,
        5: lambda: int((inverse + bits)[7:39], 2),
        6: lambda: -y,
    }[y % 7]()
    y = int(np.int64(found).astype(np.int32))
    while y > 1000:
        y = y // 3 if y % 2 else y // 2
    return y


def test_numbers(module: Module) -> None:
    x, n = torch.rand(50) * 6 + 0.1, 40
    narrow = torch.randint(-128, 128, (50,), dtype=torch.int8)
    wide = torch.randint(-(2**40), 2**40, (50,))

    def make() -> list:
        return [x, torch.zeros(50, dtype=torch.float64), narrow.clone(), wide.clone(), n]

    _, out, bytes_, longs = launch(module, "numbers", make, 64)
    by_reciprocal = torch.addcmul((x * 10).round(), x.floor(), 1 / x)  # float32, fused or not
    exact = x.double().sqrt() / 3 + by_reciprocal
    torch.testing.assert_close(out[:n], exact[:n], rtol=3e-7, atol=1e-6)
    assert torch.equal(bytes_[:n], ((x * 20).int() + narrow).to(torch.int8)[:n])
    expected = [_wide(number) for number in wide.tolist()[:n]]
    assert longs.tolist() == [*expected, *wide.tolist()[n:]]
    assert torch.equal(bytes_[n:], narrow[n:])
    assert (out[n:] == 0).all()


def _wide(number: int) -> int:
    large = number * 1000003
    quotient = abs(large) // 7 * (1 if large >= 0 else -1)
    rest = abs(quotient) % 1000 * (1 if quotient >= 0 else -1)
    return rest + (number * 2**40 >> 64)
