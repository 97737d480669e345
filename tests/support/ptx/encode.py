"""A kernel's statements as the numbers that the machine runs."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .build import names
from .flow import meeting_points
from .parse import Expansion, Statement, Unsupported

OPS, TYPES, MODES, FLAGS, SPACES, SPECIALS = (
    {name: number for number, name in enumerate(names(which))} for which in range(6)
)
MOST_LOCAL = 512 << 10  # bytes of a thread, of every GPU
SOURCES = {  # how many operands follow the target
    **dict.fromkeys(("abs", "neg", "not", "cnot", "mov", "popc", "clz", "brev", "bfind"), 1),
    **dict.fromkeys(("ex2", "lg2", "rcp", "sqrt", "rsqrt", "sin", "cos", "tanh"), 1),
    **dict.fromkeys(("add", "sub", "mul", "mul_hi", "mul_wide", "div", "rem", "min", "max"), 2),
    **dict.fromkeys(("and", "or", "xor", "shl", "shr", "copysign"), 2),
    **dict.fromkeys(("mad", "mad_hi", "mad_wide", "fma", "selp", "bfe", "prmt", "shf"), 3),
    "bfi": 4,
}
FLAG_WORDS = {"NaN": "propagate"} | {x: x for x in ("approx", "full", "ftz", "sat", "relu")}
ROUNDINGS = ("rn", "rz", "rm", "rp", "rni", "rzi", "rmi", "rpi", "rna")
INTEGER_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}  # of unsigned numbers
SCOPES = ("cta", "gpu", "sys", "cluster", "relaxed", "acquire", "release", "acq_rel", "volatile")
CACHES = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak", "L1::evict_first")
CACHES = (*CACHES, "L1::evict_last", "L1::no_allocate", "L2::128B", "L2::256B", "L2::cache_hint")


@dataclass
class Encoded:
    """A kernel's code, numbers, constants and the memory that it asks for."""

    code: np.ndarray  # int32 [instructions, fields]
    operands: np.ndarray  # int32
    constants: np.ndarray  # uint64 [constants, lanes]
    num_registers: int
    local_bytes: int


@dataclass
class _Row:
    """An instruction before its places are known."""

    op: str
    type: str = "none"
    from_type: str = "none"
    mode: str = "plain"
    flags: int = 0
    numbers: list[int] = field(default_factory=list)
    space: str = "generic"
    label: str = ""


class Encoder:
    """The instructions of one kernel."""

    def __init__(self, expansion: Expansion, global_address: Callable[[int], int]) -> None:
        self._expansion = expansion
        self._global_address = global_address  # of an array of the module
        first = len(SPECIALS)
        self._index = {name: first + i for i, name in enumerate(expansion.registers)}
        self.num_registers = first + len(self._index)
        self._constants: dict[int, int] = {}

    def encode(self) -> Encoded:
        """Every statement in turn, and an exit behind the last one."""
        statements = [*self._expansion.statements, Statement(-1, "exit")]
        rows = []
        for one in statements:
            try:
                rows.append(row := self._row(one))
                if row.mode not in MODES or row.label not in ("", *self._expansion.labels):
                    raise ValueError(f"{row.mode} {row.label}")
            except (KeyError, IndexError, ValueError) as error:
                raise Unsupported(f"line {one.line}: {_text(one)} ({error!r})") from error
        targets = [self._expansion.labels[row.label] if row.label else -1 for row in rows]
        ends = {i: row.op for i, row in enumerate(rows) if row.op in ("bra", "exit")}
        always = {i for i in ends if not statements[i].guard}
        meets = meeting_points(len(rows), ends, always, targets)
        code, operands = [], []
        for one, row, target, meet in zip(statements, rows, targets, meets):
            guard = self._index[one.guard] if one.guard else -1
            flags = row.flags | (one.negated << FLAGS["negated_guard"])
            places = (len(operands), len(row.numbers), one.line, SPACES[row.space])
            kinds = (OPS[row.op], TYPES[row.type], TYPES[row.from_type], MODES[row.mode], flags)
            code.append((*kinds, guard, target, meet, *places))
            operands += row.numbers
        constants = np.repeat(np.array(list(self._constants) or [0], np.uint64)[:, None], 32, 1)
        as_int32 = np.array(operands or [0], np.int64).astype(np.uint32).view(np.int32)
        local = self._expansion.local_bytes
        if local > MOST_LOCAL:
            raise Unsupported(f"{local} bytes of local memory a thread")
        return Encoded(np.array(code, np.int32), as_int32, constants, self.num_registers, local)

    def value(self, text: str, kind: str = "b64") -> int:
        """The place of a register, special register or constant."""
        if text in self._index:
            return self._index[text]
        if text.startswith("%") and text[1:] in SPECIALS:
            return SPECIALS[text[1:]]
        if text == "WARP_SZ":
            text = "32"
        return self._constant(self._bits(text, kind))

    def _bits(self, text: str, kind: str) -> int:
        if symbol := re.fullmatch(r"&(\w+):(\d+)&(?:\+(\d+))?", text):
            address = int(symbol[2])
            if symbol[1] == "global":
                address = self._global_address(address)
            return address + int(symbol[3] or 0)
        if real := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            number, double = int(real[2], 16), real[1] in "dD"
            if double and kind == "f32":
                value = struct.unpack("<d", struct.pack("<Q", number))[0]
                return int.from_bytes(struct.pack("<f", value), "little")
            if not double and kind == "f64":
                value = struct.unpack("<f", struct.pack("<I", number))[0]
                return int.from_bytes(struct.pack("<d", value), "little")
            return number
        number = text.rstrip("U")
        if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)", number):
            raise ValueError(f"operand {text!r}")
        octal = re.fullmatch(r"(-?)0(\d+)", number)
        whole = int(octal[1] + octal[2], 8) if octal else int(number, 0)
        return whole & (1 << 64) - 1

    def _constant(self, bits: int) -> int:
        return self.num_registers + self._constants.setdefault(bits, len(self._constants))

    def target(self, text: str) -> int:
        """A register that is written."""
        return self._index[text]

    def sink(self, text: str) -> int:
        """A register that is written, -1 for none."""
        return -1 if text == "_" else self.target(text)

    def address(self, text: str) -> tuple[int, int]:
        """(the place of its base, its offset)."""
        inner = text.strip("[] ")
        found = re.fullmatch(r"(\S+?)\s*(?:\+\s*(-?\w+))?", inner)
        return self.value(found[1]), int(found[2] or "0", 0)

    def type_of(self, register: str) -> str:
        """The type that a register is declared with, by its bits."""
        return self._expansion.registers[register]

    def _row(self, one: Statement) -> _Row:
        name, *words = one.op.replace("::cta", "").split(".")
        special = getattr(self, f"_{name}", None)
        if special is not None:
            return special(words, one.operands)
        if name in ("mul", "mad"):
            kind = words.pop(0) if words[0] in ("lo", "hi", "wide") else "lo"
            name += "" if kind == "lo" else f"_{kind}"
        row = _modifiers(_Row(name), words)
        _refuse_unknown(row)
        if len(one.operands) != SOURCES[name] + 1:
            raise ValueError("number of operands")
        target, *sources = one.operands
        row.numbers = [self.target(target), *(self._source(x, row.type) for x in sources)]
        return row

    def _source(self, text: str, kind: str) -> int:
        return self.value(text, kind)


def _modifiers(row: _Row, words: list[str]) -> _Row:
    """The row with its type, rounding and flags; a word that is not known is refused."""
    types = [word for word in words if word in TYPES]
    for word in words:
        if word in ROUNDINGS:
            row.mode = word
        elif word in FLAG_WORDS:
            row.flags |= 1 << FLAGS[FLAG_WORDS[word]]
        elif word not in TYPES:
            raise ValueError(f"modifier .{word}")
    row.type = types[0]
    row.from_type = types[-1]
    if len(types) > (2 if row.op in ("cvt", "cvt_pack") else 1):
        raise ValueError("types")
    return row


def _refuse_unknown(row: _Row) -> None:
    """Refuse modifiers and types that the machine would pass over."""
    arithmetic, extreme = row.op in ("add", "sub", "mul", "fma", "mad"), row.op in ("min", "max")
    modes, flags = {"plain"}, set()
    if row.type == "f32":
        modes |= set(ROUNDINGS[:4]) if arithmetic else {"rn"}
        flags = {"ftz", "approx", "full"} | ({"sat"} if arithmetic else set())
    elif row.type in ("f64", "f16", "bf16", "f16x2", "bf16x2"):
        modes |= {"rn"}
        others = ("div", "rcp", "sqrt", "copysign") if row.type == "f64" else ()
        if not (arithmetic or extreme or row.op in ("abs", "neg", "mov", "selp", *others)):
            raise ValueError("types")
        flags = {"approx", "ftz"} if (row.op, row.type) == ("rcp", "f64") else set()
    elif row.type == "s32" and extreme:
        flags = {"relu"}
    if extreme and row.type in ("f32", "f16", "bf16", "f16x2", "bf16x2"):
        flags |= {"propagate"}
    if row.mode not in modes or row.flags & ~sum(1 << FLAGS[flag] for flag in flags):
        raise ValueError("modifiers")


def _text(one: Statement) -> str:
    guard = f"@{'!' * one.negated}{one.guard} " if one.guard else ""
    return f"{guard}{one.op} {', '.join(one.operands)}"
