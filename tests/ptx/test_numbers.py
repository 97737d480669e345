# ruff: noqa: ANN001, ANN201  # jit functions
"""The emulator on compiled elementwise arithmetic: integers and conversions to the bit, functions
within what PTX allows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.language.extra import libdevice

Run = Callable[..., Tensor]
INF, NAN = float("inf"), float("nan")
BLOCK = 256


@triton.jit
def convert_kernel(x_ptr, out_ptr, n, BITS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x.to(out_ptr.dtype.element_ty, bitcast=BITS), mask=offs < n)


@triton.jit
def unary_kernel(x_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=1)
    if OP == "exp":
        y = tl.exp(x)
    elif OP == "exp2":
        y = tl.exp2(x)
    elif OP == "log":
        y = tl.log(x)
    elif OP == "log2":
        y = tl.log2(x)
    elif OP == "sqrt":
        y = tl.sqrt(x)
    elif OP == "sqrt_rn":
        y = tl.sqrt_rn(x)
    elif OP == "rsqrt":
        y = tl.rsqrt(x)
    elif OP == "erf":
        y = tl.erf(x)
    elif OP == "floor":
        y = tl.floor(x)
    elif OP == "abs":
        y = tl.abs(x)
    elif OP == "tanh":
        y = libdevice.tanh(x)
    tl.store(out_ptr + offs, y, mask=offs < n)


@triton.jit
def binary_kernel(x_ptr, y_ptr, out_ptr, n, OP: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=1)
    y = tl.load(y_ptr + offs, mask=offs < n, other=1)
    if OP == "add":
        z = x + y
    elif OP == "sub":
        z = x - y
    elif OP == "mul":
        z = x * y
    elif OP == "div":
        z = x / y
    elif OP == "div_rn":
        z = tl.div_rn(x, y)
    elif OP == "floor_divide":
        z = x // y
    elif OP == "fmod":
        z = x % y
    elif OP == "and":
        z = x & y
    elif OP == "or":
        z = x | y
    elif OP == "xor":
        z = x ^ y
    elif OP == "left":
        z = x << y
    elif OP == "right":
        z = x >> y
    elif OP == "min":
        z = tl.minimum(x, y)
    elif OP == "max":
        z = tl.maximum(x, y)
    elif OP == "min NaN":
        z = tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "max NaN":
        z = tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)
    elif OP == "less":
        z = tl.where(x < y, x, y)
    elif OP == "not less":
        z = tl.where(not (x < y), x, y)
    elif OP == "not equal":
        z = tl.where(x != y, x, y)
    tl.store(out_ptr + offs, z, mask=offs < n)


def unary(op: str, x: Tensor, run: Run, **options: bool) -> Tensor:
    def launch() -> Tensor:
        out = torch.full_like(x, 77)
        unary_kernel[(1,)](x, out, len(x), OP=op, BLOCK=BLOCK)
        return out

    return run(launch, **options)


def binary(op: str, x: Tensor, y: Tensor, run: Run, **options: bool) -> Tensor:
    def launch() -> Tensor:
        out = torch.full_like(x, 77)
        binary_kernel[(1,)](x, y, out, len(x), OP=op, BLOCK=BLOCK)
        return out

    return run(launch, **options)


def convert(x: Tensor, dtype: torch.dtype, run: Run, bits: bool = False) -> Tensor:
    def launch() -> Tensor:
        out = torch.full_like(x, 77, dtype=dtype)
        convert_kernel[(1,)](x, out, len(x), BITS=bits, BLOCK=BLOCK)
        return out

    return run(launch)


def same(found: Tensor, expected: Tensor) -> None:
    """Require equal bits, any NaN for a NaN."""
    nan = expected.isnan() if expected.is_floating_point() else torch.zeros_like(expected).bool()
    if expected.is_floating_point():
        assert torch.equal(found.isnan(), nan)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    assert torch.equal(found.view(bits)[~nan], expected.view(bits)[~nan])


SPECIAL = [0.0, -0.0, 1.0, -1.5, 2.5, 65504.0, 65519.0, 65520.0, 2.0**-24, 2.0**-25, 1.1 * 2.0**-25]
SPECIAL += [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11, 1 + 3 * 2.0**-11, 2.0**-149, 3.4e38, 1e-40]
SPECIAL += [INF, -INF, NAN]
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_conversions_of_floats(
    source: torch.dtype, dtype: torch.dtype, same_in_every_order: Run
) -> None:
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(100)]).to(source)
    same(convert(x, dtype, same_in_every_order), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("source", [*FLOATS[:3], torch.int64, torch.int16], ids=str)
def test_conversions_to_integers(
    source: torch.dtype, dtype: torch.dtype, same_in_every_order: Run
) -> None:
    """Towards zero, and of integers the lowest bits."""
    if source.is_floating_point:
        x = torch.cat([torch.tensor([0.0, -0.0, 1.9, 2.5, 99.99]), torch.rand(50) * 100])
        x = torch.cat([x, -x])[: 55 if dtype == torch.uint8 else None].to(source)
    else:
        x = torch.randint(torch.iinfo(source).min, torch.iinfo(source).max, (200,), dtype=source)
    same(convert(x, dtype, same_in_every_order), x.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
@pytest.mark.parametrize("source", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_conversions_from_integers(
    source: torch.dtype, dtype: torch.dtype, same_in_every_order: Run
) -> None:
    most = {torch.int64: 2**62, torch.int32: 2**31, torch.uint8: 256}[source]
    x = torch.randint(0 if source == torch.uint8 else -most, most, (200,)).to(source)
    expected = x.to(dtype) if dtype != torch.float16 else x.double().to(torch.float16)
    same(convert(x, dtype, same_in_every_order), expected)


def test_bits(same_in_every_order: Run) -> None:
    x = torch.tensor(SPECIAL)
    same(convert(x, torch.int32, same_in_every_order, bits=True), x.view(torch.int32))


INTEGERS = ("add", "sub", "mul", "floor_divide", "fmod", "and", "or", "xor", "left", "right")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16], ids=str)
@pytest.mark.parametrize("op", INTEGERS)
def test_integers(op: str, dtype: torch.dtype, same_in_every_order: Run) -> None:
    """With overflow, quotients towards zero, shifts that keep the sign."""
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    x = torch.randint(low, high, (200,), dtype=dtype)
    y = torch.randint(low, high, (200,), dtype=dtype)
    if op in ("left", "right"):
        y = y % (8 * dtype.itemsize)
    elif op in ("floor_divide", "fmod"):
        y = torch.where(y % 2 == 0, y % 17 + 1, y)
    expected = {
        "add": lambda: x + y,
        "sub": lambda: x - y,
        "mul": lambda: x * y,
        "floor_divide": lambda: torch.div(x, y, rounding_mode="trunc"),
        "fmod": lambda: torch.fmod(x, y),
        "and": lambda: x & y,
        "or": lambda: x | y,
        "xor": lambda: x ^ y,
        "left": lambda: x << y,
        "right": lambda: x >> y,
    }[op]()
    same(binary(op, x, y, same_in_every_order), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "op", ["min", "max", "min NaN", "max NaN", "less", "not less", "not equal"]
)
def test_nan_and_zeros(op: str, dtype: torch.dtype, same_in_every_order: Run) -> None:
    """Without propagation a NaN gives way to a number; a comparison with it is false but for
    inequality.
    """
    numbers = torch.tensor([NAN, 1.0, 2.0, -INF, INF, -3.0], dtype=dtype)
    x, y = (z.flatten() for z in torch.meshgrid(numbers, numbers, indexing="ij"))
    expected = {
        "min": lambda: x.fmin(y),
        "max": lambda: x.fmax(y),
        "min NaN": lambda: x.minimum(y),
        "max NaN": lambda: x.maximum(y),
        "less": lambda: torch.where(x < y, x, y),
        "not less": lambda: torch.where(~(x < y), x, y),
        "not equal": lambda: torch.where(x != y, x, y),
    }[op]()
    same(binary(op, x, y, same_in_every_order), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_rounded_arithmetic(op: str, dtype: torch.dtype, same_in_every_order: Run) -> None:
    """To nearest even, infinities and subnormal numbers too."""
    x = torch.cat([torch.tensor(SPECIAL), torch.randn(100)]).to(dtype)
    y = x.roll(7)
    expected = {"add": x + y, "sub": x - y, "mul": x * y}[op]
    same(binary(op, x, y, same_in_every_order), expected)


@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
@pytest.mark.parametrize("op", ["div", "div_rn", "sqrt_rn"])
def test_quotients_and_roots(op: str, dtype: torch.dtype, same_in_every_order: Run) -> None:
    if op != "div" and dtype == torch.float64:
        pytest.skip("Triton has it for float32 alone")
    x, y = torch.randn(2, 200, dtype=dtype).unbind()
    if op == "sqrt_rn":
        exact = x.abs().double().sqrt().float()  # torch's own float32 root is a unit off
        same(unary(op, x.abs(), same_in_every_order), exact)
        return
    found = binary(op, x, y, same_in_every_order)
    if op == "div" and dtype == torch.float32:  # 2 units off at most
        for harsh in (False, True):
            found = binary(op, x, y, same_in_every_order, harsh=harsh)
            off = (found.view(torch.int32) - (x / y).view(torch.int32)).abs()
            assert off.max() <= 2
        assert off.max() > 0
    else:
        same(found, x / y)


# Of each function its arguments, and the error that PTX and the steps around its instruction allow:
# relative to a result y, and absolute.
EXACT = 2.0**-24
FUNCTIONS: dict[str, tuple[Callable, tuple[float, float], Callable]] = {
    # The argument times log2(e) is rounded, as that is: |x| half units each; then 2 units.
    "exp": (torch.exp, (-80, 80), lambda x, y: (4 + 2 * x.abs()) * EXACT * y),
    "exp2": (torch.exp2, (-120, 120), lambda x, y: 6 * EXACT * y),
    "log": (torch.log, (0.01, 90), lambda x, y: 2.0**-21 + 4 * EXACT * y.abs()),
    "log2": (torch.log2, (0.01, 90), lambda x, y: 2.0**-21 + 4 * EXACT * y.abs()),
    "sqrt": (torch.sqrt, (0, 90), lambda x, y: 6 * EXACT * y),
    "rsqrt": (torch.rsqrt, (0.01, 90), lambda x, y: 6 * EXACT * y),
    "erf": (torch.erf, (-4, 4), lambda x, y: 6 * EXACT + 0 * y),
    "tanh": (torch.tanh, (-5, 5), lambda x, y: 8 * EXACT + 0 * y),
}


@pytest.mark.parametrize("harsh", [False, True])
@pytest.mark.parametrize("op", FUNCTIONS)
def test_functions(op: str, harsh: bool, same_in_every_order: Run) -> None:
    """Compiled from an approximation and the steps around it, or from a library's many."""
    exact, (low, high), allowed = FUNCTIONS[op]
    x = low + (high - low) * torch.rand(BLOCK)
    found, y = unary(op, x, same_in_every_order, harsh=harsh), exact(x.double())
    assert ((found - y).abs() <= allowed(x.double(), y)).all()


def test_the_edges_of_the_exponential(same_in_every_order: Run) -> None:
    x = torch.tensor([0.0, -0.0, -INF, INF, NAN, 1000.0, -1000.0])
    found = unary("exp2", x, same_in_every_order).tolist()
    assert found[:4] == [1, 1, 0, INF]
    assert math.isnan(found[4])
    assert found[5:] == [INF, 0]


@pytest.mark.parametrize("op", ["exp", "log"])
def test_functions_of_float64(op: str, same_in_every_order: Run) -> None:
    """From a library of float64 steps, within a few of its last digits."""
    x = 0.1 + torch.rand(BLOCK, dtype=torch.float64) * 5
    torch.testing.assert_close(
        unary(op, x, same_in_every_order), getattr(torch, op)(x), rtol=1e-15, atol=4e-16
    )
