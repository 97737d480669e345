"""Instructions of a loop by kind, and a model of the cycles that they keep each pipe busy for.

A model, no measurement: it knows how many results a pipe gives a cycle, and nothing of latency, of
bank conflicts, of what hides behind what, or of a GPU's clock.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from math import prod

from .sass import Instruction

SCORES = 128 * 64  # of the tile that cycles are counted for
PARTITIONS = 4  # of an SM or a compute unit, each with a scheduler and pipes of its own
# Where each instruction goes, by Nsight Compute's list of pipes: conversions of floats to half
# floats are the ALU's, those between floats and integers XU's, integer products FMA's.
KINDS = {
    "tensor": "HGMMA HMMA IGMMA IMMA QGMMA DMMA",
    "xu": "MUFU I2F F2I F2F FRND POPC FLO BREV",
    "fma": "FFMA FMUL FADD FFMA2 FMUL2 FADD2 HFMA2 HADD2 HMUL2 IMAD IMUL IDP FFMA32I FMUL32I",
    "alu": """FMNMX FSEL FSET FSETP ISETP LOP3 LOP PLOP3 P2R R2P SEL IADD3 IADD VIADD IMNMX VIMNMX
        VIMNMX3 FMNMX3 LEA SHF SHL SHR PRMT SGXT BMSK IABS MOV F2FP I2FP CS2R FCHK HSETP2 HMNMX2
        VABSDIFF ISCADD I2I F2IP I2IP IADD2 FSWZADD VOTE VIADDMNMX""",
    "fp64": "DADD DFMA DMUL DSETP",
    "lsu": "LDS STS LDG STG LD ST LDSM STSM ATOM ATOMS ATOMG RED REDG REDUX MATCH",
    "local": "LDL STL",
    "copy": "LDGSTS UTMALDG UTMASTG UBLKCP",
    "shuffle": "SHFL",
    "barrier": "BAR MEMBAR FENCE ERRBAR WARPSYNC WARPGROUP DEPBAR LDGDEPBAR SYNCS CCTL ARRIVES",
    "branch": "BRA BRX JMP CALL RET EXIT BSSY BSYNC BREAK BMOV YIELD NANOSLEEP KILL BPT",
    "uniform": """UMOV UIADD3 UIMAD ULDC ULEA ULOP3 UPLOP3 USEL USHF USGXT UISETP UPRMT UFLO UPOPC
        UBMSK UBREV R2UR S2UR VOTEU ELECT UCGABAR_WAIT UCGABAR_ARV UTMACCTL UTMACMDFLUSH
        USETMAXREG""",
    "other": "NOP LDC S2R B2R R2B LEPC",
}  # fmt: skip
_KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}

# Cycles of one partition for one warp instruction, from the results a cycle of an SM in the CUDA
# programming guide's table of arithmetic throughput: 64 of min, max, compare, select, logic, shift
# and integer sums, 16 of exp2 and reciprocals; of float32 sums and products 64 on 8.0, 128 on 9.0,
# of float64's 32 and 64. Integer products go through one half of 9.0's float32 lanes while the
# other half stays free for floats.
RATES: dict[str, dict[str, float]] = {
    "sm_80": {"alu": 2, "fma": 2, "xu": 8, "fp64": 4},
    "sm_90": {"alu": 2, "fma": 1, "xu": 8, "fp64": 2},
}
# Multiply-adds of half floats a cycle of one partition's tensor core, dense: A100's 312 TFLOP/s at
# 1410 MHz and 108 SMs, H100's 989 at 1830 MHz and 132. mma.sync reaches about 5/8 of the latter.
PRODUCTS: dict[str, dict[str, int]] = {
    "sm_80": {"HMMA": 256},
    "sm_90": {"HGMMA": 512, "HMMA": 320},
}
_SIZE = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)|HMMA\.(16|8)(8|16)(4|8|16)\b")


def kind_of(instruction: Instruction) -> str:
    """The kind among KINDS; "unknown" for a name that they lack."""
    return _KIND_OF.get(instruction.name, "unknown")


def count(instructions: Sequence[Instruction]) -> dict[str, int]:
    """How many of each kind, most first."""
    return dict(Counter(map(kind_of, instructions)).most_common())


def tensor(instructions: Sequence[Instruction]) -> dict[str, int]:
    """Instructions of the tensor cores by shape and type of operands."""
    return dict(Counter(x.opcode for x in instructions if kind_of(x) == "tensor"))


def multiply_adds(opcode: str) -> int:
    """Multiply-adds of one warp, which has a quarter of the rows of a group."""
    found = _SIZE.match(opcode)
    if found is None:
        raise ValueError(f"the shape of {opcode} must be known")
    size = prod(int(side) for side in found.groups() if side)
    return size // 4 if opcode.startswith("HGMMA") else size


def cycles(
    instructions: Sequence[Instruction], target: str, warps: int, scores: int = SCORES
) -> dict[str, int]:
    """Cycles of one partition for SCORES scores, by pipe, of a loop whose rounds make `scores`.

    "issue" is a slot an instruction; "lsu" is the unit that the partitions share.
    """
    kinds, of_warp = count(instructions), {"issue": len(instructions)}
    of_warp |= {pipe: kinds.get(pipe, 0) * rate for pipe, rate in RATES[target].items()}
    of_warp["tensor"] = sum(
        number * multiply_adds(opcode) / _products_a_cycle(opcode, target)
        for opcode, number in tensor(instructions).items()
    )
    of_warp["lsu"] = PARTITIONS * sum(map(_shared_cycles, instructions))
    scale = warps / PARTITIONS * SCORES / scores
    return {pipe: round(number * scale) for pipe, number in of_warp.items() if number}


def _products_a_cycle(opcode: str, target: str) -> float:
    """Multiply-adds of one partition; tf32 has half of those of half floats."""
    return PRODUCTS[target][opcode.partition(".")[0]] / (2 if "TF32" in opcode else 1)


def _shared_cycles(instruction: Instruction) -> int:
    """Cycles of the unit for loads and stores, which the partitions share, at 128 bytes a cycle, as
    if no two of a warp met in a bank, nor in an address.
    """
    bulk = instruction.name.startswith("U")
    if bulk or kind_of(instruction) not in ("lsu", "local", "copy", "shuffle"):
        return 0
    modifiers = instruction.opcode.split(".")[1:]
    if instruction.name in ("LDSM", "STSM"):  # matrices of 128 bytes
        return next((int(x) for x in modifiers if x in ("2", "4")), 1)
    return {"64": 2, "128": 4}.get(next((x for x in modifiers if x in ("64", "128")), ""), 1)


def waits(instructions: Sequence[Instruction]) -> tuple[list[int], list[int]]:
    """Groups of copies, and of products of warp groups, that each wait leaves in flight.

    `cp.async.wait_group` and `wgmma.wait_group` of PTX.
    """
    found: dict[str, list[int]] = {"DEPBAR": [], "WARPGROUP": []}
    for x in instructions:
        if x.opcode in ("DEPBAR.LE", "WARPGROUP.DEPBAR.LE"):
            found[x.name].append(int(x.operands.split(",")[1], 16))
    return found["DEPBAR"], found["WARPGROUP"]
