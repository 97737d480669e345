"""PTX text as functions of statements, calls expanded in place."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

SHARED_BASE = 1024  # the machine's: an address of 0 is a wrong one
SIZES = {"pred": 1, "8": 1, "16": 2, "32": 4, "64": 8}


class Unsupported(Exception):
    """PTX that the emulator does not know, and so does not run."""


@dataclass(frozen=True)
class Statement:
    """An instruction as it is written, its names made unique."""

    line: int  # of the PTX
    op: str
    operands: tuple[str, ...] = ()
    guard: str = ""
    negated: bool = False


@dataclass
class Function:
    """A kernel or a device function."""

    name: str
    params: dict[str, tuple[int, int]]  # (offset, bytes) of each
    results: list[str]
    body: str
    line: int
    max_registers: int = 0  # of a thread at its start, 0 where it does not say


@dataclass
class Frame:
    """A call in place: the names in it, and where its arguments lie."""

    prefix: str
    symbols: dict[str, tuple[str, int]]  # (space, address)
    scopes: list[dict[str, str]] = field(default_factory=lambda: [{}])
    places: list[str] = field(default_factory=lambda: [""])  # of labels, by scopes
    end: str = ""  # the label behind it, for a return


class Unit:
    """A PTX file: its functions, its arrays, and the source line of each of its lines."""

    def __init__(self, text: str) -> None:
        plain = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.S)
        plain = re.sub(r"//[^\n]*", "", plain)
        plain = re.sub(
            r"\.section[^{]*\{.*?\n\s*\}", lambda x: "\n" * x[0].count("\n"), plain, flags=re.S
        )
        self.functions: dict[str, Function] = {}
        self.symbols: dict[str, tuple[str, int]] = {}  # arrays: (space, offset)
        self.globals: dict[str, bytes] = {}
        self.shared_bytes = 0
        self.source = _source_lines(text)
        outside = self._functions(plain)
        self._arrays(outside)

    def _functions(self, text: str) -> str:
        """Note every function with a body; the text between them."""
        head = re.compile(
            r"\.(entry|func)\s*(\([^)]*\))?\s*([\w$.]+)\s*(?:\(([^)]*)\))?([^{;]*)([{;])"
        )
        outside, at = [], 0
        while found := head.search(text, at):
            outside.append(text[at : found.start()])
            at = found.end()
            if found[6] == ";":
                continue
            depth = 1
            while depth:
                brace = re.compile(r"[{}]").search(text, at)
                at, depth = brace.end(), depth + (1 if brace[0] == "{" else -1)
            body, line = text[found.end() : at - 1], text.count("\n", 0, found.end()) + 1
            results = list(_params(found[2][1:-1])) if found[2] else []
            most = re.search(r"\.maxnreg\s+(\d+)", found[5])
            self.functions[found[3]] = Function(
                found[3], _params(found[4]), results, body, line, int(most[1]) if most else 0
            )
        return "".join([*outside, text[at:]])

    def _arrays(self, outside: str) -> None:
        """Place all arrays but those of a thread; shared memory of a launch's size comes last."""
        texts = (outside, *(function.body for function in self.functions.values()))
        found = [
            x
            for text in texts
            for x in re.findall(r"(?<!\w)\.(?:shared|global|const)\s[^;]*", text)
        ]
        for statement in sorted(found, key=lambda x: bool(re.search(r"\[\s*\]\s*$", x))):
            self.declare(statement)

    def declare(self, statement: str, local: int = 0) -> tuple[str, int]:
        """An array's (name, bytes); those of a module and of shared memory find their place."""
        found = re.match(
            r"\.(shared|global|const|local|param)\s+(?:\.align\s+(\d+)\s+)?\.\w?(\d+|pred)\s+([\w$%.]+)\s*"
            r"((?:\[\s*\d*\s*\])*)\s*(?:=\s*(.*))?$",
            statement.strip(),
            flags=re.S,
        )
        if found is None:
            raise Unsupported(f"declaration {statement.strip()!r}")
        space, align, kind, name, lengths, values = found.groups()
        size = SIZES[kind]
        for length in re.findall(r"\d+", lengths):
            size *= int(length)
        if re.search(r"\[\s*\]", lengths):
            size = 0  # as many bytes as a launch asks for
        aligned = int(align or SIZES[kind])
        if name in self.symbols:
            return name, size
        if space == "shared":
            start = -(-self.shared_bytes // aligned) * aligned
            self.symbols[name] = ("shared", SHARED_BASE + start)
            self.shared_bytes = start + size
        elif space in ("global", "const"):
            self.symbols[name] = ("global", len(self.globals))
            self.globals[name] = _initial(values, SIZES[kind], size)
        else:
            return name, -(-local // aligned) * aligned + size
        return name, size


def _initial(values: str | None, width: int, size: int) -> bytes:
    numbers = re.findall(r"-?\w+", values or "")
    if any(not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", number) for number in numbers):
        raise Unsupported(f"array values {values!r}")
    mask = (1 << 8 * width) - 1
    parts = [(int(n.rstrip("U"), 0) & mask).to_bytes(width, "little") for n in numbers]
    return b"".join(parts).ljust(size, b"\0")


def _params(text: str | None) -> dict[str, tuple[int, int]]:
    """The offset and bytes of each parameter, as a launch lays them out."""
    places, at = {}, 0
    for one in filter(str.strip, (text or "").split(",")):
        found = re.search(r"\.\w(\d+)\s+(?:\.ptr.*?\s)?([\w$%.]+)(?:\[(\d+)\])?\s*$", one.strip())
        if found is None:
            raise Unsupported(f"parameter {one.strip()!r}")
        width = SIZES[found[1]]
        align = re.match(r"\s*\.param\s+\.align\s+(\d+)", one)
        aligned = int(align[1]) if align else width
        at = -(-at // aligned) * aligned
        places[found[2]] = (at, width * int(found[3] or 1))
        at += places[found[2]][1]
    return places


def _source_lines(text: str) -> dict[int, str]:
    """The source line of each line of PTX behind a `.loc`."""
    files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', text))
    found, now = {}, ""
    for number, line in enumerate(text.split("\n"), 1):
        if loc := re.match(r"\s*\.loc\s+(\d+)\s+(\d+)", line):
            now = f"{files.get(loc[1], '?').rsplit('/', 1)[-1]}:{loc[2]}"
        found[number] = now
    return found


class Expansion:
    """The statements of a kernel, calls and scopes expanded; its registers and local arrays."""

    def __init__(self, unit: Unit, kernel: str) -> None:
        self.unit = unit
        self.registers: dict[str, str] = {}  # type by unique name
        self.labels: dict[str, int] = {}
        self.statements: list[Statement] = []
        self.symbols: dict[str, tuple[str, int]] = dict(unit.symbols)
        self.local_bytes = 0
        self._calls = 0
        function = unit.functions[kernel]
        params = {name: ("param", place) for name, (place, _) in function.params.items()}
        self._scopes = 0
        self._expand(function, Frame("", params), ())
        for i, one in enumerate(self.statements):
            if len(one.operands) > 1 and one.op.split(".")[0] == "bra":
                known = [label for label in one.operands if label in self.labels]
                self.statements[i] = replace(one, operands=(*known, one.operands[-1])[:1])

    def _expand(self, function: Function, frame: Frame, callers: tuple[str, ...]) -> None:
        if function.name in callers:
            raise Unsupported(f"{function.name} calls itself")
        for line, text in _pieces(function.body, function.line):
            if text == "{":
                frame.scopes.append({})
                self._scopes += 1
                frame.places.append(f"{self._scopes}~")
            elif text == "}":
                frame.scopes.pop()
                frame.places.pop()
            elif text.endswith(":"):
                label = frame.prefix + frame.places[-1] + text[:-1]
                if label in self.labels:
                    raise Unsupported(f"line {line}: two labels {text[:-1]}")
                self.labels[label] = len(self.statements)
            elif text.startswith("."):
                self._declare(text, frame)
            else:
                self._statement(line, text, frame, (*callers, function.name))

    def _declare(self, text: str, frame: Frame) -> None:
        kind = text.split()[0]
        if kind == ".reg":
            _, type_, names = text.split(None, 2)
            for name in names.split(","):
                found = re.fullmatch(r"\s*([\w$%]+)(?:<(\d+)>)?\s*", name)
                many = found[2] is not None
                each = [f"{found[1]}{i}" for i in range(int(found[2]))] if many else [found[1]]
                for one in each:
                    unique = f"{frame.prefix}{one}{'~' * (len(frame.scopes) - 1)}"
                    if self.registers.get(unique, type_[1:]) != type_[1:]:
                        unique += type_  # of another scope
                    frame.scopes[-1][one] = unique
                    self.registers[unique] = type_[1:]
        elif kind in (".local", ".param"):
            name, end = self.unit.declare(text, self.local_bytes)
            size = self.unit.declare(text)[1]
            frame.symbols[name] = ("local", end - size)
            self.local_bytes = end
        elif kind in (".shared", ".global", ".const"):
            name, _ = self.unit.declare(text)
            frame.symbols[name] = self.symbols[name] = self.unit.symbols[name]
        elif kind not in (".loc", ".file", ".pragma", ".branchtargets"):
            raise Unsupported(text)

    def _statement(self, line: int, text: str, frame: Frame, callers: tuple[str, ...]) -> None:
        guard = re.match(r"@(!?)([\w$%]+)\s+", text)
        text = text[guard.end() :] if guard else text
        op, _, rest = text.partition(" ") if " " in text else (text, "", "")
        one = Statement(
            line,
            op,
            tuple(self._named(x, frame) for x in split(rest)),
            self._named(guard[2], frame) if guard else "",
            bool(guard and guard[1]),
        )
        if op.split(".")[0] == "call":
            if guard:
                raise Unsupported("a call under a guard")
            self._call(split(rest), frame, callers)
        elif op.split(".")[0] == "bra":
            inside = tuple(frame.prefix + x + rest.strip() for x in reversed(frame.places))
            self.statements.append(replace(one, operands=inside))
        elif op.split(".")[0] == "ret" and frame.end:
            self.statements.append(replace(one, op="bra", operands=(frame.end,)))
        else:
            self.statements.append(one)

    def _call(self, parts: list[str], frame: Frame, callers: tuple[str, ...]) -> None:
        results = split(parts.pop(0)[1:-1]) if parts[0].startswith("(") else []
        name = parts.pop(0)
        given = split(parts.pop(0)[1:-1]) if parts else []
        if name not in self.unit.functions:
            raise Unsupported(f"a call of {name}")
        function = self.unit.functions[name]
        self._calls += 1
        prefix = f"call{self._calls}:"
        formal = [*function.results, *function.params]
        symbols = dict(zip(formal, (frame.symbols[x] for x in [*results, *given]), strict=True))
        self._expand(function, Frame(prefix, symbols, end=f"{prefix}end"), callers)
        self.labels[f"{prefix}end"] = len(self.statements)

    def _named(self, operand: str, frame: Frame) -> str:
        """The operand with every register, symbol and label by its unique name."""

        def unique(found: re.Match) -> str:
            name = found[0]
            for scope in reversed(frame.scopes):
                if name in scope:
                    return scope[name]
            if name in frame.symbols:
                space, address = frame.symbols[name]
                return f"&{space}:{address}&"
            if name in self.symbols:
                space, address = self.symbols[name]
                return f"&{space}:{address}&"
            return name

        return re.sub(r"[$%A-Za-z_][\w$]*(?:\.[xyz])?", unique, operand)


def _pieces(body: str, line: int) -> Iterator[tuple[int, str]]:
    """(line, statement, label, brace or directive) in turn."""
    start = re.compile(
        r"\s*(?:([{}])|([\w$]+:)(?!:)|(\.(?:loc|file)\b[^\n]*)|([^;]*);)", flags=re.S
    )
    at = counted = 0
    while found := start.match(body, at):
        text = " ".join(next(x for x in found.groups() if x is not None).split())
        place = found.start(found.lastindex)
        line, counted = line + body.count("\n", counted, place), place
        at = found.end()
        if text:
            yield line, text
    if body[at:].strip():
        raise Unsupported(body[at:].strip()[:80])


def split(text: str) -> list[str]:
    """The parts between commas that stand outside of brackets."""
    parts, depth, part = [], 0, ""
    for letter in text:
        depth += {"{": 1, "[": 1, "(": 1, "}": -1, "]": -1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += letter
    return [*parts, part.strip()] if part.strip() else parts
