"""The instructions whose operands have forms of their own."""

from __future__ import annotations

import re

from .asynchronous import Asynchronous
from .encode import (
    CACHES,
    FLAGS,
    INTEGER_COMPARISONS,
    MODES,
    SCOPES,
    SPACES,
    TYPES,
    _modifiers,
    _Row,
)
from .parse import split


def _parts(text: str) -> list[str]:
    """The registers of a vector, or the one register."""
    return split(text.strip("{}"))


def _untyped(words: list[str], *known: str) -> str:
    """The one type among words of which each must be known."""
    kinds = [word for word in words if word in TYPES]
    for word in words:
        if word not in (*known, *TYPES, *SPACES, *SCOPES, *CACHES):
            raise ValueError(f"modifier .{word}")
    if len(kinds) != 1:
        raise ValueError("types")
    return kinds[0]


def _vector(words: list[str]) -> int:
    """How many registers a load or store has."""
    return next((int(w[1]) for w in words if w in ("v2", "v4", "v8")), 1)


def _is_float(row: _Row) -> bool:
    return row.type[0] in "fbt" and row.type not in ("b8", "b16", "b32", "b64")


def _space(words: list[str]) -> str:
    return next(
        (w for w in words if w in ("global", "shared", "local", "param", "const")), "generic"
    )


class Instructions(Asynchronous):
    """Every instruction: those of `SOURCES` by the base, the others each by a method."""

    def _mov(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        kind = _untyped(words)
        target, source = operands
        if source.startswith("{"):
            parts = [self.value(x, kind) for x in _parts(source)]
            return _Row("pack", kind, numbers=[self.target(target), *parts])
        if target.startswith("{"):
            parts = [self.sink(x) for x in _parts(target)]
            return _Row("unpack", kind, numbers=[*parts, self.value(source)])
        return _Row("mov", kind, numbers=[self.target(target), self.value(source, kind)])

    def _setp(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        comparison, *words = words
        joins = [word for word in words if word in ("and", "or", "xor")]
        row = _modifiers(_Row("setp"), [word for word in words if word not in joins])
        mode = INTEGER_COMPARISONS.get(comparison, comparison)
        if mode in INTEGER_COMPARISONS.values() and comparison in INTEGER_COMPARISONS:
            row.type = row.type.replace("b", "u")
        narrow = row.type in ("f16", "bf16")
        if row.flags & ~(0 if narrow else 1 << FLAGS["ftz"]) or "x2" in row.type:
            raise ValueError("modifiers")
        targets, left, right, *third = operands
        p, _, q = targets.partition("|")
        if bool(third) != bool(joins):
            raise ValueError("operands")
        other = self.value(third[0].lstrip("!")) if third else -1
        row.mode = mode
        row.numbers = [self.target(p), self.target(q) if q else -1]
        row.numbers += [self.value(x, row.type) for x in (left, right)]
        negated = bool(third) and third[0].startswith("!")
        row.numbers += [other, MODES[f"m_{joins[0]}"] if joins else 0, int(negated)]
        return row

    def _cvt(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        row = _modifiers(_Row("cvt"), words)
        target, *sources = operands
        if len(sources) == 2:
            if row.type not in ("f16x2", "bf16x2") or row.from_type != "f32" or row.flags:
                raise ValueError("types")
            row.op = "cvt_pack"
            row.numbers = [self.target(target), *(self.value(x, "f32") for x in sources)]
            return row
        if "x2" in row.type + row.from_type:
            raise ValueError("types")
        known = (1 << FLAGS["ftz"]) | (1 << FLAGS["sat"])
        from_integer = row.from_type[0] in "us" and _is_float(row)
        if row.flags & ~known or ("sat" in words and from_integer):
            raise ValueError("modifiers")
        width = TYPES[self.type_of(target)]
        row.numbers = [self.target(target), self.value(sources[0], row.from_type), width]
        return row

    def _lop3(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        target, *sources, table = operands
        numbers = [self.target(target), *(self.value(x) for x in sources), int(table, 0)]
        return _Row("lop3", _untyped(words), numbers=numbers)

    def _shf(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        side, how, kind = (w.replace("l", "left") if w == "l" else w for w in words)
        numbers = [self.target(operands[0]), *(self.value(x) for x in operands[1:])]
        mode = {"left": "left", "r": "right"}[side]
        flags = {"wrap": 1 << FLAGS["wrap"], "clamp": 0}[how]
        return _Row("shf", kind, mode=mode, flags=flags, numbers=numbers)

    def _ld(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        kind = _untyped(words, "v2", "v4", "v8", "const")
        target, place = operands[:2]
        parts = _parts(target)
        if len(parts) != _vector(words) or len(operands) > 2:
            raise ValueError("operands")
        registers = [self.sink(x) for x in parts]
        width = TYPES[next(self.type_of(x) for x in parts if x != "_")]
        space = _symbol_space(place) or _space(words)
        space = "global" if space == "const" else space
        return _Row("ld", kind, numbers=[*self.address(place), width, *registers], space=space)

    def _st(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        kind = _untyped(words, "v2", "v4", "v8")
        place, source = operands
        values = [self.value(x, kind) for x in _parts(source)]
        if len(values) != _vector(words):
            raise ValueError("operands")
        space = _symbol_space(place) or _space(words)
        return _Row("st", kind, numbers=[*self.address(place), *values], space=space)

    def _atom(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        ways = [x for x in words if x in ("exch", "cas", "inc", "dec") or f"m_{x}" in MODES]
        kind = _untyped(words, *ways)
        target, place, by, *other = operands
        mode = ways[0] if ways[0] in MODES else f"m_{ways[0]}"
        numbers = [self.sink(target or "_"), *self.address(place)]
        numbers += [self.value(by, kind), self.value(other[0], kind) if other else -1]
        return _Row("atom", kind, mode=mode, numbers=numbers, space=_space(words))

    def _red(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        if "async" in words:
            raise ValueError("modifier .async")
        return self._atom(words, ("", *operands))

    def _cvta(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        to = words[0] == "to"
        space = _space(words)
        numbers = [self.target(operands[0]), self.value(operands[1]), int(to)]
        return _Row("cvta", "u64", numbers=numbers, space="global" if space == "const" else space)

    def _cp(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        if words[:2] == ["async", "commit_group"]:
            return _Row("cp_async_commit_group")
        if words[:2] == ["async", "wait_group"]:
            return _Row("cp_async_wait_group", numbers=[int(operands[0], 0)])
        if words[:2] == ["async", "wait_all"]:
            return _Row("cp_async_wait_group", numbers=[-1])
        if words[:2] == ["async", "bulk"]:
            return self._bulk(words[2:], operands)
        known = ("async", "shared", "global", *CACHES)
        if int(operands[2], 0) not in (4, 8, 16):
            raise ValueError("size")
        if unknown := [word for word in words if word not in known]:
            raise ValueError(f"modifier .{unknown[0]}")
        to, source, size, *rest = operands
        read, unless = -1, -1
        if rest:
            predicate = rest[0] in self._index and self.type_of(rest[0]) == "pred"
            read, unless = (-1, self.value(rest[0])) if predicate else (self.value(rest[0]), -1)
        numbers = [*self.address(to), *self.address(source), int(size, 0), read, unless]
        return _Row("cp_async", "b8", numbers=numbers, space="shared")

    def _ldmatrix(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        target, place = operands
        return self._matrix("ldmatrix", words, place, [self.target(x) for x in _parts(target)])

    def _stmatrix(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        place, source = operands
        return self._matrix("stmatrix", words, place, [self.value(x) for x in _parts(source)])

    def _matrix(self, op: str, words: list[str], place: str, registers: list[int]) -> _Row:
        count = next(word for word in words if re.fullmatch("x[124]", word))
        _untyped(words, "sync", "aligned", "m8n8", "trans", count)
        if "m8n8" not in words or "b16" not in words or len(registers) != int(count[1]):
            raise ValueError("shape")
        flags = ("trans" in words) << FLAGS["trans"]
        return _Row(
            op, "b16", flags=flags, numbers=[*self.address(place), len(registers), *registers]
        )

    def _shfl(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        sync, mode, kind = words
        targets, *sources = operands
        to, _, inside = targets.partition("|")
        numbers = [self.target(to), self.target(inside) if inside else -1]
        numbers += [self.value(x) for x in sources]
        if (sync, len(sources)) != ("sync", 4):
            raise ValueError("operands")
        return _Row("shfl", kind, mode=mode, numbers=numbers)

    def _vote(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        _, mode, kind = words
        target, source, members = operands
        negated = int(source.startswith("!"))
        numbers = [
            self.target(target),
            self.value(source.lstrip("!")),
            negated,
            self.value(members),
        ]
        return _Row("vote", kind, mode=mode, numbers=numbers)

    def _redux(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        _, way, kind = words
        if kind == "f32":
            raise ValueError("types")
        numbers = [self.target(operands[0]), *(self.value(x) for x in operands[1:])]
        return _Row("redux", kind, mode=f"m_{way}", numbers=numbers)

    def _activemask(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        return _Row("activemask", words[0], numbers=[self.target(operands[0])])

    def _bra(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        return _Row("bra", label=operands[0])

    def _exit(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        return _Row("exit")

    _ret = _exit

    def _trap(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        return _Row("trap")

    def _mma(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        *order, shape, row, column, d, a, b, c = words
        depth = int(re.fullmatch(r"m16n8k(\d+)", shape)[1])
        most = {"f16": 16, "bf16": 16, "tf32": 8}[a]
        known = (order, row, column, d, c, a) == (
            ["sync", "aligned"],
            "row",
            "col",
            "f32",
            "f32",
            b,
        )
        if not known or depth not in (most // 2, most):
            raise ValueError("kind of product")
        to, *sources = ([*_parts(x)] for x in operands)
        if [len(x) for x in (to, *sources)] != [4, 4 * depth // most, 2 * depth // most, 4]:
            raise ValueError("operands")
        numbers = [depth, *(self.target(x) for x in to)]
        numbers += [self.value(x, "f32") for source in sources for x in source]
        return _Row("mma", "f32", a, numbers=numbers)

    def _wgmma(self, words: list[str], operands: tuple[str, ...]) -> _Row:
        if words[0] == "fence":
            return _Row("wgmma_fence")
        if words[0] == "commit_group":
            return _Row("wgmma_commit_group")
        if words[0] == "wait_group":
            return _Row("wgmma_wait_group", numbers=[int(operands[0], 0)])
        start, sync, aligned, shape, d, a, b = words
        columns, depth = map(int, re.fullmatch(r"m64n(\d+)k(\d+)", shape).groups())
        known = (start, sync, aligned, d, a) == ("mma_async", "sync", "aligned", "f32", b)
        if not known or depth != {"f16": 16, "bf16": 16, "tf32": 8}[a]:
            raise ValueError("kind of product")
        to, left, right, keep, *rest = operands
        registers = left.startswith("{")
        scale_a, scale_b, *trans = (int(x, 0) for x in rest)
        trans_a, trans_b = ([0, *trans] if registers else trans) if trans else (0, 0)
        numbers = [columns, depth, int(registers), self.value(keep, "pred"), scale_a, scale_b]
        numbers += [trans_a, trans_b, *(self.value(x) for x in _parts(left)), self.value(right)]
        numbers += [self.target(x) for x in _parts(to)]
        if len(_parts(to)) != columns // 2:
            raise ValueError("operands")
        return _Row("wgmma", "f32", a, numbers=numbers)


def _symbol_space(place: str) -> str:
    """The space of an array that an address names: a call's arguments lie in local memory."""
    found = re.match(r"\[\s*&(\w+):", place)
    return found[1] if found and found[1] in ("local", "param") else ""
