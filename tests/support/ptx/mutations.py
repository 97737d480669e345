"""Mutants of a kernel's PTX, each without one instruction that orders memory or keeps within it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor

from ptx import Fault, Module, emulated
from ptx.module import ORDERS

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
}
# Guards: of an access, its predicate; of a copy that fills with zeros, the number of bytes it
# takes.
PREDICATE = re.compile(r"@!?%p\d+\s+(?=(?:ld|st|atom|red|cp\.async)\.)")
BYTES = re.compile(r"(cp\.async\.c[ag]\.shared\.global[^;]*,\s*(?:0x)?\d+)\s*,\s*%r\d+\s*;")
WAIT = re.compile(r"(wait_group(?:\.sync\.aligned)?\s+)(\d+)")
PLACE = re.compile(r"\.loc\s.*//\s*(\S+):(\d+):\d+")
MOST_GUARDS = 24  # of one kernel, spread over it


@dataclass(frozen=True)
class Mutant:
    """A PTX text that lacks one instruction, or has a weaker one."""

    kind: str  # of KINDS, or one of them "weakened", or "guard"
    line: int  # of the PTX, from 1
    place: str  # the line of the source that it comes from, as "fwd.py:88"
    was: str
    text: str = field(repr=False)


def mutants(ptx: str) -> Iterator[Mutant]:
    """Every mutant of a text; of guards a spread sample."""
    lines, place, guards = ptx.splitlines(), "", []
    for at, line in enumerate(lines):
        if located := PLACE.search(line):
            place = f"{located[1]}:{located[2]}"
        for kind, changed in _changes(line):
            text = "\n".join([*lines[:at], changed, *lines[at + 1 :]])
            mutant = Mutant(kind, at + 1, place, line.strip(), text)
            if kind == "guard":
                guards.append(mutant)
            else:
                yield mutant
    step = -(-len(guards) // MOST_GUARDS) or 1
    yield from guards[::step]


def _changes(line: str) -> Iterator[tuple[str, str]]:
    """(kind, what stands in the line's place) of every mutant of one line."""
    for kind, pattern in KINDS.items():
        if re.match(pattern, line):
            yield kind, GONE + line.strip()
            if wait := WAIT.search(line):
                yield f"{kind} weakened", WAIT.sub(rf"\g<1>{int(wait[2]) + 1}", line)
    if PREDICATE.search(line):
        yield "guard", PREDICATE.sub("", line)
    if BYTES.search(line):
        yield "guard", BYTES.sub(r"\1;", line)


@dataclass(frozen=True)
class Launch:
    """A launch as it was called, to be repeated with other texts."""

    kernel: str
    text: str
    arguments: list[Tensor | int | float]
    sizes: tuple  # grid, block, bytes of shared memory

    def run(self, module: Module, order: str) -> list[Tensor]:
        """The tensors after the launch of a module's kernel, from the same beginning."""
        arguments = [x.clone() if isinstance(x, Tensor) else x for x in self.arguments]
        module.launch(self.kernel, arguments, *self.sizes, order)
        return [x for x in arguments if isinstance(x, Tensor)]

    def finds(self, mutant: Mutant, expected: list[Tensor]) -> bool:
        """Whether a mutant faults, or has other results, in an order of warps."""
        module = Module(mutant.text)
        for order in ORDERS:
            try:
                results = self.run(module, order)
            except Fault:
                return True
            if not all(map(same_bits, results, expected)):
                return True
        return False


def same_bits(x: Tensor, y: Tensor) -> bool:
    """Whether the bits are equal, of NaN too."""
    return torch.equal(
        x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)
    )


def launches(call: Callable[[], object], target: str) -> list[Launch]:
    """The launches of a call on small tensors, each compiled kernel once."""
    found: dict[str, Launch] = {}
    texts: list[str] = []
    launch = Module.launch

    def note(module: Module, kernel: str, arguments: list, *rest: object) -> None:
        copies = [x.clone() if isinstance(x, Tensor) else x for x in arguments]
        found.setdefault(texts[-1], Launch(kernel, texts[-1], copies, rest[:3]))
        launch(module, kernel, arguments, *rest)

    def read(ptx: str) -> str:
        texts.append(ptx)
        return ptx

    with mock.patch.object(Module, "launch", note), emulated(target, edit=read):
        call()
    return list(found.values())
