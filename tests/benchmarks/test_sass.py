"""Machine code is read right: control flow, loops, kinds of instructions, and what is counted."""

from __future__ import annotations

import re

import pytest

from dense_attn.benchmarks.compiled import counts, occupancy, sass
from dense_attn.benchmarks.compiled.sass import Instruction
from dense_attn.benchmarks.layout_attention import workloads

# Two loops, one in the other, the inner one left by a call; a wait for a barrier; a copy loop; and
# the endless loop behind the end.
CODE = """
	.section	.text.some_kernel,"ax",@progbits
some_kernel:
.text.some_kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0020*/                   MOV R2, RZ ;
.L_x_2:
        /*0030*/                   FFMA R0, R0, R1, R2 ;
        /*0040*/                   FMNMX.FTZ R3, R0, R1, !PT ;
        /*0050*/                   MUFU.EX2 R4, R3 ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/                   LDS.128 R12, [R20+0x100] ;
        /*0080*/                   LDSM.16.M88.4 R12, [R20] ;
        /*0090*/              @!P6 CALL.REL.NOINC `(.L_x_3) ;
        /*00a0*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*00b0*/                   IADD3 R2, R2, 0x1, RZ ;
        /*00c0*/               @P1 BRA `(.L_x_1) ;
.L_x_4:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R5 ;
        /*00e0*/              @!P0 BRA `(.L_x_4) ;
.L_x_0:
        /*00f0*/               @P2 EXIT ;
        /*0100*/                   BRA.U !UP0, `(.L_x_6) ;
.L_x_5:
        /*0110*/                   LDGSTS.E.BYPASS.128 [R4], desc[UR4][R6.64] ;
        /*0120*/                   LDGDEPBAR ;
        /*0130*/                   DEPBAR.LE SB0, 0x3 ;
        /*0140*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0150*/                   BRA P3, `(.L_x_5) ;
.L_x_6:
        /*0160*/                   EXIT ;
.L_x_7:
        /*0170*/                   BRA `(.L_x_7);
        /*0180*/                   NOP ;

	.section	.text.another,"ax",@progbits
another:
.text.another:
        /*0000*/                   EXIT ;
"""


@pytest.fixture
def function() -> sass.Function:
    functions = sass.parse(CODE)
    assert [function.name for function in functions] == ["some_kernel", "another"]
    return functions[0]


def test_lines_are_read() -> None:
    (function, _) = sass.parse(CODE)
    found = [x for block in function.blocks for x in block]
    assert [x.address for x in found] == list(range(0, 0x190, 0x10))
    assert found[1] == Instruction(0x10, "BRA", "`(.L_x_0)", "!P0")
    assert found[7].opcode == "LDS.128"
    assert found[7].name == "LDS"
    assert [x.target for x in found if x.target] == [
        f".L_x_{label}" for label in (0, 3, 2, 1, 4, 6, 5, 7)
    ]


def test_what_ends_and_what_goes_on() -> None:
    """A condition is before the instruction or among its operands."""
    lines = ("BRA `(.L_x_0)", "@P0 BRA `(.L_x_0)", "BRA P3, `(.L_x_0)", "BRA.U !UP0, `(.L_x_0)")
    lines += ("EXIT", "@!P1 EXIT", "CALL.REL.NOINC `(.L_x_0)", "RET.REL.NODEC R2 `(another)", "NOP")
    code = "".join(f"/*{i:04x}*/ {line} ;\n" for i, line in enumerate(lines))
    (function,) = sass.parse(f".section .text.f\n.L_x_0:\n{code}")
    found = [x.ends for block in function.blocks for x in block]
    assert found == [True, False, False, False, True, False, False, True, False]


def test_loops_are_found(function: sass.Function) -> None:
    """The outer one holds another; what waits, and what is never reached, is none."""
    starts = [[function.blocks[min(loop)][0].address for loop in function.loops]]
    assert starts == [[0x20, 0x30, 0xD0, 0x110]]
    inner = [[x.address for x in loop] for loop in function.inner_loops]
    assert inner == [list(range(0x30, 0xB0, 0x10)), list(range(0x110, 0x160, 0x10))]
    assert [x.address for x in function.straight] == [0x0, 0x10, 0xF0, 0x100, 0x160]


@pytest.mark.parametrize("moved", ["MOV R7, UR35", "IMAD.U32 R7, RZ, RZ, UR35"])
def test_what_waits_is_no_loop(moved: str) -> None:
    """Some compilers move the barrier's phase in each round."""
    lines = (moved, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR34+0x20], R7", "@!P0 BRA `(.L_x_0)")
    for last, loops in ((), 0), (("FADD R0, R0, R7",), 1):
        code = "".join(f"/*{i:04x}*/ {x} ;\n" for i, x in enumerate((*last, *lines, "EXIT")))
        (function,) = sass.parse(f".section .text.f\n.L_x_0:\n{code}")
        assert len(function.loops) == 1
        assert len(function.inner_loops) == loops


def test_kinds_and_waits(function: sass.Function) -> None:
    first, second = function.inner_loops
    kinds = {"lsu": 2, "branch": 2, "fma": 1, "alu": 1, "xu": 1, "tensor": 1}
    assert counts.count(first) == kinds
    assert counts.tensor(first) == {"HMMA.16816.F32.BF16": 1}
    assert counts.waits(first) == ([], [])
    assert counts.count(second) == {"barrier": 3, "copy": 1, "branch": 1}
    assert counts.waits(second) == ([3], [1])
    assert counts.kind_of(Instruction(0, "NEWOP.X")) == "unknown"
    names = " ".join(counts.KINDS.values()).split()
    assert len(names) == len(set(names))


def test_cycles_by_hand(function: sass.Function) -> None:
    """Eight warps, two a partition, and half of the scores: four times a warp's cycles."""
    (loop, copies) = function.inner_loops
    found = counts.cycles(loop, "sm_80", 8, counts.SCORES // 2)
    # 16*8*16 products at 256 a cycle; 4 + 4 rounds of 128 bytes for each of 8 warps.
    expected = {"issue": 8 * 4, "alu": 2 * 4, "fma": 2 * 4, "xu": 8 * 4, "tensor": 8 * 4}
    assert found == expected | {"lsu": (4 + 4) * 8 * 2}
    assert counts.cycles(copies, "sm_90", 4) == {"issue": 5, "lsu": 4 * 4}


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32", 16 * 8 * 16),
        ("HMMA.1688.F32.TF32", 16 * 8 * 8),
        ("HMMA.1684.F32.TF32", 16 * 8 * 4),
        ("HGMMA.64x64x16.F32.BF16", 16 * 64 * 16),
        ("HGMMA.64x256x8.F32.TF32", 16 * 256 * 8),
    ],
)
def test_products_of_a_warp(opcode: str, expected: int) -> None:
    assert counts.multiply_adds(opcode) == expected


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("the shape of HMMA.NEW must be known")):
        counts.multiply_adds("HMMA.NEW")


@pytest.mark.parametrize(
    ("target", "registers", "shared", "warps", "expected"),
    [
        ("sm_90", 202, 49664, 8, 1),  # 208 registers: two warps a partition
        ("sm_90", 119, 65536, 8, 2),
        ("sm_90", 128, 65536, 8, 2),
        ("sm_90", 129, 0, 8, 1),
        ("sm_90", 32, 115 << 10, 8, 2 - 1),  # 228 KB, one of them the system's for each program
        ("sm_80", 32, 81 << 10, 8, 2),
        ("sm_80", 32, 82 << 10, 8, 1),
        ("sm_80", 16, 0, 4, 16),  # 64 warps
        ("sm_90", 16, 0, 1, 32),
        ("gfx942", 258, 16384, 4, 1),
        ("gfx942", 60, 16384, 4, 4),
    ],
)
def test_programs_by_hand(
    target: str, registers: int, shared: int, warps: int, expected: int
) -> None:
    assert occupancy.programs_a_processor(target, registers, shared, warps) == expected


def test_waves_by_hand() -> None:
    """2 samples of 8 heads of 4096 rows, 128 a program, on 132 SMs; the prompt has 77 keys."""
    found = occupancy.waves("sm_90", "fwd", 40, (128, 64), 1)
    assert found == {"sd15-self-64": round(2 * 8 * 32 / 132, 2)}
    found = occupancy.waves("sm_90", "bwd_kv", 40, (64, 128), 2)
    expected = {"sd15-self-64": 2 * 8 * 32, "sd15-cross-64": 2 * 8}
    assert found == {name: round(count / 264, 2) for name, count in expected.items()}
    assert list(occupancy.waves("sm_80", "row_fwd", 40, (128, 128), 1)) == ["sd15-cross-64"]
    several = occupancy.waves("sm_90", "specialised_fwd", 64, (128, 128), 1)
    assert several
    assert not any("cross" in name for name in several)


def test_waves_are_of_what_a_gpu_runs() -> None:
    long = {x.name: x.num_heads for x in workloads.on_a_gpu() if x.name.startswith("long")}
    assert set(long.values()) == {8}
    assert "long-self-64k" in occupancy.waves("sm_90", "fwd", 64, (128, 64), 1)
