"""Mutants of a kernel's PTX, each without one instruction that orders memory or keeps within it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from unittest import mock

import torch
from torch import Tensor

from ptx import Fault, Module, TensorMap, emulated
from ptx.module import ORDERS, Argument

# A mutant takes the place of one line, so that every other line keeps its number.
GONE = "// gone: "
SEPARATED = r"^\s*(?P<line>{}\s*;)"
KINDS = {
    "barrier": SEPARATED.format(r"(?:bar|barrier)(?:\.cta)?\.sync(?:\.aligned)?\s+[^;]+"),
    "warp barrier": SEPARATED.format(r"bar\.warp\.sync\s+[^;]+"),
    "copy wait": SEPARATED.format(r"cp\.async\.wait_(?:group\s+\d+|all)"),
    "wgmma wait": SEPARATED.format(r"wgmma\.wait_group\.sync\.aligned\s+\d+"),
    "wgmma fence": SEPARATED.format(r"wgmma\.fence\.sync\.aligned"),
    "proxy fence": SEPARATED.format(r"fence\.proxy\.async[\w.:]*"),
    "bulk wait": SEPARATED.format(r"cp\.async\.bulk\.wait_group(?:\.read)?\s+\d+"),
    "phase wait": SEPARATED.format(r"@!complete\s+bra\.uni\s+waitLoop"),
    "arrival": SEPARATED.format(r"(?:@!?%p\d+\s+)?mbarrier\.arrive[^;]*"),
}
# Guards: of an access, its predicate; of a copy that fills with zeros, the number of bytes it
# takes.
PREDICATE = re.compile(r"@(!?)(%p\d+)\s+(?=(?:ld|st|atom|red|cp\.async)\.)")
BYTES = re.compile(r"(cp\.async\.c[ag]\.shared\.global[^;]*,\s*)(\w+)\s*,\s*(%r\d+)\s*;")
GUARD = re.compile(r"\s*(@!?%p\d+\s+|)")
WAIT = re.compile(r"(wait_group(?:\.sync\.aligned|\.read)?\s+)(\d+)")
PLACE = re.compile(r"\.loc\s.*//\s*(\S+):(\d+):\d+")
MOST_GUARDS = 24  # of one kernel, spread over it
MOST_LAUNCHES = 3  # of one kernel: buffers that take turns differ with the number of turns


@dataclass(frozen=True)
class Mutant:
    """A PTX text that lacks one instruction, or has a weaker one."""

    kind: str  # of KINDS, or one of them "weakened", or "guard"
    line: int  # of the PTX, from 1
    place: str  # the line of the source that it comes from, as "fwd.py:88"
    was: str
    text: str = field(repr=False)
    probe: str = field(repr=False)  # the text with a trap where the mutant makes a difference


def mutants(ptx: str) -> Iterator[Mutant]:
    """Every mutant of a text; of guards a spread sample."""
    lines, place, guards = ptx.splitlines(), "", []
    for at, line in enumerate(lines):
        if located := PLACE.search(line):
            place = f"{located[1]}:{located[2]}"
        for kind, changed, trap in _changes(line):
            text, probe = ("\n".join([*lines[:at], x, *lines[at + 1 :]]) for x in (changed, trap))
            mutant = Mutant(kind, at + 1, place, line.strip(), text, probe)
            if kind == "guard":
                guards.append(mutant)
            else:
                yield mutant
    step = -(-len(guards) // MOST_GUARDS) or 1
    yield from guards[::step]


def _changes(line: str) -> Iterator[tuple[str, str, str]]:
    """(kind, what stands in the line's place, a trap where that matters) of a line's mutants."""
    for kind, pattern in KINDS.items():
        if re.match(pattern, line):
            yield kind, GONE + line.strip(), f"{GUARD.match(line)[1]}trap;"
            if wait := WAIT.search(line):
                weaker = WAIT.sub(rf"\g<1>{int(wait[2]) + 1}", line)
                yield f"{kind} weakened", weaker, "trap;"
    if guard := PREDICATE.search(line):
        otherwise = "@" + ("" if guard[1] else "!") + guard[2]
        yield "guard", PREDICATE.sub("", line), f"{otherwise} trap; {line}"
    if size := BYTES.search(line):
        fewer = f"setp.ne.s32 %fewer, {size[3]}, {size[2]}; @%fewer trap;"
        yield "guard", BYTES.sub(r"\1\2;", line), f"{{ .reg .pred %fewer; {fewer} }} {line}"


class Kernel:
    """A compiled kernel and its launches, to be repeated with other texts."""

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._launches: list[tuple[list, tuple]] = []  # arguments; grid, block, shared memory
        self._results: list[list[Tensor]] = []

    def add(self, arguments: list[Argument], sizes: tuple) -> None:
        """Note a launch, unless there are enough."""
        if len(self._launches) < MOST_LAUNCHES:
            self._launches.append((_copied(arguments), sizes))

    def check(self) -> None:
        """Require the same bits in every order of warps; mutants are compared with them."""
        module = Module(self.text)
        for launch in range(len(self._launches)):
            results = [self._run(module, launch, order) for order in ORDERS]
            assert all(all(map(_same_bits, one, results[0])) for one in results), self.name
            self._results.append(results[0])

    def finds(self, mutant: Mutant) -> bool:
        """Whether a mutant faults, or has other results, in a launch in an order of warps."""
        module = Module(mutant.text)
        for launch, expected in enumerate(self._results):
            for order in ORDERS:
                try:
                    results = self._run(module, launch, order)
                except Fault:
                    return True
                if not all(map(_same_bits, results, expected)):
                    return True
        return False

    def reaches(self, mutant: Mutant) -> bool:
        """Whether a mutant makes a difference to what runs: see Mutant.probe."""
        module = Module(mutant.probe)
        try:
            for launch in range(len(self._launches)):
                self._run(module, launch, ORDERS[0])
        except Fault:
            return True
        return False

    def _run(self, module: Module, launch: int, order: str) -> list[Tensor]:
        arguments, sizes = self._launches[launch]
        arguments = _copied(arguments)
        module.launch(self.name, arguments, *sizes, order)
        return [x for x in arguments if isinstance(x, Tensor)]


def kernels(call: Callable[[], object], target: str) -> list[Kernel]:
    """The kernels that a call on small tensors launches."""
    found: dict[str, Kernel] = {}
    texts: list[str] = []
    launch = Module.launch

    def note(module: Module, name: str, arguments: list, *sizes: object, **how: object) -> None:
        found.setdefault(texts[-1], Kernel(name, texts[-1])).add(arguments, sizes)
        launch(module, name, arguments, *sizes, **how)

    def read(ptx: str) -> str:
        texts.append(ptx)
        return ptx

    with mock.patch.object(Module, "launch", note), emulated(target, edit=read):
        call()
    return list(found.values())


def _copied(arguments: list[Argument]) -> list[Argument]:
    def copy(x: Argument) -> Argument:
        if isinstance(x, TensorMap):
            return replace(x, tensor=x.tensor.clone())
        return x.clone() if isinstance(x, Tensor) else x

    return [copy(x) for x in arguments]


def _same_bits(x: Tensor, y: Tensor) -> bool:
    return torch.equal(*(z.contiguous().view(-1).view(torch.uint8) for z in (x, y)))
