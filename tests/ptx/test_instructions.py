"""One PTX instruction at a time, to the bit: NaN, zeros' signs, rounding, widths, clamps."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from ptx import Module
from ptx.planted import assemble

KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.visible .entry one(.param .u64 inputs_param, .param .u64 out_param)
.reqntid 32
{{
    .reg .pred %p<4>;
    .reg .b64 %inputs, %out;
    {registers}
    ld.param.u64 %inputs, [inputs_param];
    ld.param.u64 %out, [out_param];
    {loads}
    {instruction};
    {store}
    ret;
}}
"""


def f32(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


def f64(number: float) -> int:
    return struct.unpack("<Q", struct.pack("<d", number))[0]


def f16(number: float) -> int:
    return struct.unpack("<H", struct.pack("<e", number))[0]


def bf16(number: float) -> int:
    """The number must have 8 bits of mantissa."""
    return f32(number) >> 16


INF, NAN = float("inf"), float("nan")
NAN32, NAN64, NAN16, NAN_BF16 = 0x7FFFFFFF, f64(NAN), 0x7FFF, 0x7FFF
TINY = 2.0**-149
LOW, HIGH = 0x80000000, 0x7FFFFFFF
ONE_UP = 1 + 2.0**-23

# (instruction with d, a, b, c for its registers; width of d; operands as (width, bits); d's bits)
FLOATS = [
    ("min.f32 d, a, b", 32, [(32, f32(NAN)), (32, f32(2))], f32(2)),
    ("min.NaN.f32 d, a, b", 32, [(32, f32(NAN)), (32, f32(2))], NAN32),
    ("max.f32 d, a, b", 32, [(32, f32(-1)), (32, f32(NAN))], f32(-1)),
    ("max.f32 d, a, b", 32, [(32, f32(NAN)), (32, f32(NAN))], NAN32),
    ("max.NaN.f32 d, a, b", 32, [(32, f32(-1)), (32, f32(NAN))], NAN32),
    ("max.f32 d, a, b", 32, [(32, f32(-0.0)), (32, f32(0.0))], f32(0.0)),
    ("min.f32 d, a, b", 32, [(32, f32(0.0)), (32, f32(-0.0))], f32(-0.0)),
    ("max.ftz.f32 d, a, b", 32, [(32, f32(TINY)), (32, f32(-1))], f32(0.0)),
    ("min.f64 d, a, b", 64, [(64, f64(NAN)), (64, f64(2))], f64(2)),
    ("min.NaN.bf16 d, a, b", 16, [(16, bf16(NAN)), (16, bf16(2))], NAN_BF16),
    ("max.f16 d, a, b", 16, [(16, f16(NAN)), (16, f16(2))], f16(2)),
    ("add.f32 d, a, b", 32, [(32, f32(1)), (32, f32(2.0**-24))], f32(1)),  # a tie, to even
    ("add.rz.f32 d, a, b", 32, [(32, f32(1)), (32, f32(-(2.0**-30)))], f32(1 - 2.0**-24)),
    ("add.rm.f32 d, a, b", 32, [(32, f32(-1)), (32, f32(-(2.0**-30)))], f32(-ONE_UP)),
    ("add.rp.f32 d, a, b", 32, [(32, f32(1)), (32, f32(2.0**-30))], f32(ONE_UP)),
    ("add.f32 d, a, b", 32, [(32, f32(INF)), (32, f32(-INF))], NAN32),
    ("add.f32 d, a, b", 32, [(32, f32(TINY)), (32, f32(TINY))], f32(2 * TINY)),
    ("add.ftz.f32 d, a, b", 32, [(32, f32(TINY)), (32, f32(TINY))], f32(0)),
    ("mul.f32 d, a, b", 32, [(32, f32(2.0**-100)), (32, f32(2.0**-40))], f32(2.0**-140)),
    ("mul.ftz.f32 d, a, b", 32, [(32, f32(2.0**-100)), (32, f32(2.0**-40))], f32(0)),
    ("mul.ftz.f32 d, a, b", 32, [(32, f32(-TINY)), (32, f32(2.0**100))], f32(-0.0)),
    ("mul.sat.f32 d, a, b", 32, [(32, f32(3)), (32, f32(2))], f32(1)),
    # Fused: the product's last bit survives the sum.
    ("fma.rn.f32 d, a, b, c", 32, [(32, f32(ONE_UP))] * 2 + [(32, f32(-1 - 2.0**-22))],
     f32(2.0**-46)),
    ("fma.rn.f32 d, a, b, c", 32, [(32, f32(ONE_UP)), (32, f32(1)), (32, f32(2.0**-24))],
     f32(1 + 2.0**-22)),
    ("fma.rn.ftz.f32 d, a, b, c", 32, [(32, f32(2.0**-100)), (32, f32(2.0**-30)), (32, 0)], 0),
    ("fma.rn.f64 d, a, b, c", 64, [(64, f64(1 + 2.0**-52))] * 2 + [(64, f64(-1 - 2.0**-51))],
     f64(2.0**-104)),
    ("fma.rn.f16 d, a, b, c", 16, [(16, f16(1 + 2.0**-10))] * 2 + [(16, f16(-1))], f16(2.0**-9)),
    ("div.rn.f32 d, a, b", 32, [(32, f32(1)), (32, f32(3))], f32(1 / 3)),
    ("div.full.f32 d, a, b", 32, [(32, f32(1)), (32, f32(0))], f32(INF)),
    ("div.full.f32 d, a, b", 32, [(32, f32(0)), (32, f32(0))], NAN32),
    ("sqrt.rn.f32 d, a", 32, [(32, f32(2))], f32(2**0.5)),
    ("sqrt.rn.f64 d, a", 64, [(64, f64(2))], f64(2**0.5)),
    ("ex2.approx.ftz.f32 d, a", 32, [(32, f32(-INF))], f32(0)),
    ("ex2.approx.ftz.f32 d, a", 32, [(32, f32(3))], f32(8)),
    ("ex2.approx.ftz.f32 d, a", 32, [(32, f32(-130))], f32(0)),
    ("ex2.approx.f32 d, a", 32, [(32, f32(-130))], f32(2.0**-130)),
    ("lg2.approx.ftz.f32 d, a", 32, [(32, f32(TINY))], f32(-INF)),
    ("lg2.approx.f32 d, a", 32, [(32, f32(-1))], NAN32),
    ("rcp.approx.ftz.f32 d, a", 32, [(32, f32(4))], f32(0.25)),
    ("abs.f32 d, a", 32, [(32, f32(-0.0))], f32(0)),
    ("neg.f32 d, a", 32, [(32, f32(0))], f32(-0.0)),
    ("abs.bf16x2 d, a", 32, [(32, bf16(-3) << 16 | bf16(-2))], bf16(3) << 16 | bf16(2)),
    ("copysign.f32 d, a, b", 32, [(32, f32(-1)), (32, f32(3))], f32(-3)),
]  # fmt: skip
CONVERSIONS = [
    ("cvt.rn.bf16.f32 d, a", 16, [(32, f32(1 + 2.0**-8))], bf16(1)),  # a tie, to even
    ("cvt.rn.bf16.f32 d, a", 16, [(32, f32(1 + 3 * 2.0**-8))], bf16(1 + 2.0**-6)),
    ("cvt.rn.bf16.f32 d, a", 16, [(32, f32(3.4e38))], bf16(INF)),
    ("cvt.rn.bf16.f32 d, a", 16, [(32, f32(NAN))], NAN_BF16),
    ("cvt.rn.bf16x2.f32 d, a, b", 32, [(32, f32(3)), (32, f32(2))], bf16(3) << 16 | bf16(2)),
    ("cvt.rn.f16x2.f32 d, a, b", 32, [(32, f32(3)), (32, f32(2))], f16(3) << 16 | f16(2)),
    ("cvt.rn.f16.f32 d, a", 16, [(32, f32(1 + 2.0**-11))], f16(1)),
    ("cvt.rn.f16.f32 d, a", 16, [(32, f32(65520))], f16(INF)),
    ("cvt.rn.f16.f32 d, a", 16, [(32, f32(2.0**-25 + 2.0**-40))], 1),
    ("cvt.rn.f16.f64 d, a", 16, [(64, f64(1 + 2.0**-11 + 2.0**-40))], f16(1 + 2.0**-10)),
    ("cvt.f32.f16 d, a", 32, [(16, 1)], f32(2.0**-24)),
    ("cvt.f32.bf16 d, a", 32, [(16, bf16(-1.5))], f32(-1.5)),
    ("cvt.rn.f32.f64 d, a", 32, [(64, f64(1 + 2.0**-24 + 2.0**-50))], f32(ONE_UP)),
    ("cvt.f64.f32 d, a", 64, [(32, f32(TINY))], f64(TINY)),
    ("cvt.ftz.f64.f32 d, a", 64, [(32, f32(TINY))], 0),
    ("cvt.rzi.s32.f32 d, a", 32, [(32, f32(-2.9))], (1 << 32) - 2),
    ("cvt.rzi.s32.f32 d, a", 32, [(32, f32(3e9))], HIGH),
    ("cvt.rzi.s32.f32 d, a", 32, [(32, f32(NAN))], 0),
    ("cvt.rzi.u32.f32 d, a", 32, [(32, f32(-1))], 0),
    ("cvt.rzi.s32.f64 d, a", 32, [(64, f64(NAN))], LOW),
    ("cvt.rzi.s64.f32 d, a", 64, [(32, f32(NAN))], 1 << 63),
    ("cvt.rni.s32.f32 d, a", 32, [(32, f32(2.5))], 2),
    ("cvt.rmi.f32.f32 d, a", 32, [(32, f32(-2.5))], f32(-3)),
    ("cvt.rpi.f32.f32 d, a", 32, [(32, f32(2.5))], f32(3)),
    ("cvt.rzi.s32.f64 d, a", 32, [(64, f64(-7.9))], (1 << 32) - 7),
    ("cvt.rn.f32.s32 d, a", 32, [(32, 2**24 + 1)], f32(2.0**24)),
    ("cvt.rn.f32.s64 d, a", 32, [(64, (1 << 64) - 3)], f32(-3)),
    ("cvt.rn.f32.u64 d, a", 32, [(64, (1 << 64) - 1)], f32(2.0**64)),
    ("cvt.rn.f64.s64 d, a", 64, [(64, 2**53 + 1)], f64(2.0**53)),
    ("cvt.rn.f64.u32 d, a", 64, [(32, LOW)], f64(2.0**31)),
    # Widths: a source as narrow as its type, whatever a wider register holds above it.
    ("cvt.s64.s32 d, a", 64, [(64, 0x1234_FFFF_FFFF)], (1 << 64) - 1),
    ("cvt.u64.u32 d, a", 64, [(64, 0x1234_8000_0000)], LOW),
    ("cvt.s32.s8 d, a", 32, [(32, 0x1280)], 0xFFFFFF80),
    ("cvt.u32.u16 d, a", 32, [(16, 0xFFFF)], 0xFFFF),
    ("cvt.s32.s16 d, a", 32, [(16, 0x8000)], 0xFFFF8000),
    ("cvt.u16.u32 d, a", 16, [(32, 0x12345678)], 0x5678),
    ("cvt.u32.u64 d, a", 32, [(64, 0x1_2345_6789)], 0x23456789),
    ("cvt.sat.s8.s32 d, a", 32, [(32, 300)], 127),
]  # fmt: skip
INTEGERS = [
    ("add.s32 d, a, b", 32, [(32, HIGH), (32, 1)], LOW),
    ("sub.s64 d, a, b", 64, [(64, 0), (64, 1)], (1 << 64) - 1),
    ("mul.lo.s32 d, a, b", 32, [(32, 0x10001), (32, 0x10001)], 0x20001),
    ("mul.hi.u32 d, a, b", 32, [(32, LOW), (32, 6)], 3),
    ("mul.hi.s32 d, a, b", 32, [(32, (1 << 32) - 1), (32, 1)], 0xFFFFFFFF),
    ("mul.wide.s32 d, a, b", 64, [(32, (1 << 32) - 2), (32, 3)], (1 << 64) - 6),
    ("mul.wide.u32 d, a, b", 64, [(32, (1 << 32) - 2), (32, 3)], 0x2_FFFF_FFFA),
    ("mul.wide.u16 d, a, b", 32, [(16, 0xFFFF), (16, 0xFFFF)], 0xFFFE0001),
    ("mad.lo.s32 d, a, b, c", 32, [(32, 3), (32, (1 << 32) - 1), (32, 5)], 2),
    ("mad.wide.s32 d, a, b, c", 64, [(32, (1 << 32) - 1), (32, 2), (64, 1)], (1 << 64) - 1),
    ("div.s32 d, a, b", 32, [(32, (1 << 32) - 7), (32, 2)], (1 << 32) - 3),
    ("rem.s32 d, a, b", 32, [(32, (1 << 32) - 7), (32, 2)], (1 << 32) - 1),
    ("div.u32 d, a, b", 32, [(32, (1 << 32) - 8), (32, 2)], 0x7FFFFFFC),
    ("rem.u64 d, a, b", 64, [(64, (1 << 64) - 1), (64, 10)], 5),
    ("shl.b32 d, a, b", 32, [(32, 1), (32, 31)], LOW),
    ("shl.b32 d, a, b", 32, [(32, 1), (32, 33)], 0),  # further than the width
    ("shr.u32 d, a, b", 32, [(32, LOW), (32, 40)], 0),
    ("shr.s32 d, a, b", 32, [(32, LOW), (32, 40)], 0xFFFFFFFF),
    ("shr.s16 d, a, b", 16, [(16, 0x8000), (32, 3)], 0xF000),
    ("shr.u64 d, a, b", 64, [(64, 1 << 63), (32, 60)], 8),
    ("shr.u64 d, a, b", 64, [(64, 1 << 63), (32, 66)], 0),
    ("shr.s64 d, a, b", 64, [(64, 1 << 63), (32, 66)], (1 << 64) - 1),
    ("shl.b64 d, a, b", 64, [(64, 1), (32, 64)], 0),
    ("shf.l.wrap.b32 d, a, b, c", 32, [(32, 0xAABBCCDD), (32, 0x11223344), (32, 40)], 0x223344AA),
    ("shf.r.wrap.b32 d, a, b, c", 32, [(32, 0xAABBCCDD), (32, 0x11223344), (32, 8)], 0x44AABBCC),
    ("shf.l.clamp.b32 d, a, b, c", 32, [(32, 0xAABBCCDD), (32, 0x11223344), (32, 40)], 0xAABBCCDD),
    ("and.b32 d, a, b", 32, [(32, 0xF0F0), (32, 0xFF00)], 0xF000),
    ("or.b64 d, a, b", 64, [(64, 1 << 40), (64, 1)], 1 << 40 | 1),
    ("xor.b16 d, a, b", 16, [(16, 0xF0F0), (16, 0xFFFF)], 0x0F0F),
    ("not.b32 d, a", 32, [(32, 0)], 0xFFFFFFFF),
    ("neg.s32 d, a", 32, [(32, 5)], (1 << 32) - 5),
    ("abs.s32 d, a", 32, [(32, (1 << 32) - 5)], 5),
    ("lop3.b32 d, a, b, c, 0xE8", 32, [(32, 0b1100), (32, 0b1010), (32, 0b0110)], 0b1110),
    ("min.s32 d, a, b", 32, [(32, (1 << 32) - 1), (32, 1)], (1 << 32) - 1),
    ("min.u32 d, a, b", 32, [(32, (1 << 32) - 1), (32, 1)], 1),
    ("max.s64 d, a, b", 64, [(64, (1 << 64) - 1), (64, 1)], 1),
    ("bfe.u32 d, a, 4, 8", 32, [(32, 0xABCDE)], 0xCD),
    ("bfe.s32 d, a, 4, 8", 32, [(32, 0xABCDE)], 0xFFFFFFCD),
    ("bfi.b32 d, a, b, 8, 8", 32, [(32, 0x1FF), (32, 0x12345678)], 0x1234FF78),
    ("prmt.b32 d, a, b, 0x5410", 32, [(32, 0x33221100), (32, 0x77665544)], 0x55441100),
    ("prmt.b32 d, a, b, 0xBA98", 32, [(32, 0x80FF7F00), (32, 0)], 0xFFFF0000),  # signs
    ("popc.b32 d, a", 32, [(32, 0xF00F)], 8),
    ("clz.b32 d, a", 32, [(32, 1)], 31),
    ("clz.b64 d, a", 32, [(64, 0)], 64),
    ("brev.b32 d, a", 32, [(32, 1)], LOW),
    ("bfind.u32 d, a", 32, [(32, 0)], 0xFFFFFFFF),
    ("mov.b32 d, {a, b}", 32, [(16, 0x1111), (16, 0x2222)], 0x22221111),
    ("mov.b64 d, {a, b}", 64, [(32, 0x1111), (32, 0x2222)], 0x2222_0000_1111),
    ("mov.b64 {_, d}, a", 32, [(64, 0x2222_0000_1111)], 0x2222),
    ("mov.b64 d, 0d3FF0000000000000", 64, [], f64(1)),
    ("mov.b32 d, 0f3F800000", 32, [], f32(1)),
]  # fmt: skip
# A comparison's outcome as selp hands it on: 1 or 0.
COMPARISONS = [
    ("setp.lt.f32 %p1, a, b", 32, [(32, f32(NAN)), (32, f32(2))], 0),
    ("setp.ltu.f32 %p1, a, b", 32, [(32, f32(NAN)), (32, f32(2))], 1),
    ("setp.ne.f32 %p1, a, b", 32, [(32, f32(NAN)), (32, f32(NAN))], 0),
    ("setp.neu.f32 %p1, a, b", 32, [(32, f32(NAN)), (32, f32(NAN))], 1),
    ("setp.eq.f32 %p1, a, b", 32, [(32, f32(-0.0)), (32, f32(0.0))], 1),
    ("setp.eq.ftz.f32 %p1, a, b", 32, [(32, f32(TINY)), (32, f32(0.0))], 1),
    ("setp.num.f32 %p1, a, b", 32, [(32, f32(NAN)), (32, f32(1))], 0),
    ("setp.nan.f32 %p1, a, b", 32, [(32, f32(NAN)), (32, f32(1))], 1),
    ("setp.lt.s32 %p1, a, b", 32, [(32, LOW), (32, 0)], 1),
    ("setp.lt.u32 %p1, a, b", 32, [(32, LOW), (32, 0)], 0),
    ("setp.gt.s16 %p1, a, b", 32, [(16, 0x8000), (16, 0)], 0),
    ("setp.le.s64 %p1, a, b", 32, [(64, 1 << 63), (64, 0)], 1),
    ("setp.lo.u32 %p1, a, b", 32, [(32, 0), (32, LOW)], 1),
    ("setp.eq.s32 %p2, a, a; setp.gt.and.s32 %p1, a, b, !%p2", 32, [(32, 2), (32, 1)], 0),
    ("setp.eq.s32 %p2|%p1, a, b", 32, [(32, 2), (32, 1)], 1),
]  # fmt: skip
SELECT = "; selp.b32 d, 1, 0, %p1"
TABLE = [*FLOATS, *CONVERSIONS, *INTEGERS]
TABLE += [(text + SELECT, *rest) for text, *rest in COMPARISONS]


def kernel(instruction: str, width: int, operands: list[tuple[int, int]]) -> str:
    """The text of a kernel of one instruction on operands out of memory."""
    sizes = {"d": width} | {name: size for name, (size, _) in zip("abc", operands)}
    loads = [
        f"ld.global.b{size} %{name}, [%inputs + {8 * i}];"
        for i, (name, (size, _)) in enumerate(zip("abc", operands))
    ]
    names = "".join(
        f"%{c}" if _stands_alone(instruction, i) else c for i, c in enumerate(instruction)
    )
    return KERNEL.format(
        registers=" ".join(f".reg .b{size} %{name};" for name, size in sizes.items()),
        loads="\n    ".join(loads),
        instruction=names,
        store=f"st.global.b{width} [%out], %d;",
    )


def _stands_alone(text: str, i: int) -> bool:
    """Whether a letter is the name of a register and no part of a word."""
    around = text[max(i - 1, 0) : i] + text[i + 1 : i + 2]
    return text[i] in "abcd" and not any(c.isalnum() or c in ".%" for c in around)


@pytest.mark.parametrize(
    ("instruction", "width", "operands", "expected"),
    [pytest.param(*one, id=f"{i}: {one[0]}") for i, one in enumerate(TABLE)],
)
def test_instruction(
    instruction: str, width: int, operands: list[tuple[int, int]], expected: int
) -> None:
    inputs = torch.tensor([_signed(bits) for _, bits in operands])
    out = torch.full((1,), 0x5A5A5A5A5A5A5A5A)
    Module(kernel(instruction, width, operands)).launch("one", [inputs, out], (1, 1, 1), (1, 1, 1))
    found = out.item() & ((1 << width) - 1)
    assert hex(found) == hex(expected)
    assert out.item() >> width == 0x5A5A5A5A5A5A5A5A >> width if width < 64 else True


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def test_the_table_is_ptx(tmp_path: Path) -> None:
    assemble((kernel(*row[:3]) for row in TABLE), "one", "sm_90", tmp_path)
