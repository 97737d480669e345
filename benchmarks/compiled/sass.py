"""Machine code of NVIDIA's as nvdisasm prints it: instructions, basic blocks and loops."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

_FUNCTION = re.compile(r"^\s*\.section\s+\.text\.([\w$.]+)")
_LABEL = re.compile(r"^(\.L_x_\d+|\$[\w$.]+):\s*$")
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]+)\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)\s*(?P<operands>[^;]*?)\s*;"
)
_TARGET = re.compile(r"`\((\.L_x_\d+|\$[\w$.]+)\)")
# Calls too: the compiler leaves loops by them, to a label that no return comes back from.
_BRANCHES = {"BRA", "BRX", "JMP", "JMX", "CALL"}
_ENDS = {"EXIT", "RET"}
PRODUCTS = ("HMMA", "HGMMA")  # of half floats on tensor cores


@dataclass(frozen=True)
class Instruction:
    """A line of machine code."""

    address: int
    opcode: str  # with its modifiers, as "HGMMA.64x64x16.F32.BF16"
    operands: str = ""
    predicate: str | None = None

    @property
    def name(self) -> str:
        """The opcode alone."""
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> str | None:
        """The label that it may go on at."""
        found = _TARGET.search(self.operands)
        return found.group(1) if found and self.name in _BRANCHES else None

    @property
    def ends(self) -> bool:
        """Whether the next instruction never follows it."""
        if self.predicate is not None:
            return False
        # A branch may have a condition among its operands, too.
        alone = _TARGET.fullmatch(self.operands) is not None
        return self.name in _ENDS or (self.name in ("BRA", "JMP") and alone)


@dataclass(frozen=True)
class Function:
    """Basic blocks in the order of their addresses, the first of them the entry."""

    name: str
    blocks: tuple[tuple[Instruction, ...], ...]
    successors: tuple[tuple[int, ...], ...]  # of each block, by index

    @cached_property
    def reached(self) -> tuple[int, ...]:
        """The blocks that the entry leads to."""
        seen, waiting = {0}, [0]
        while waiting:
            new = set(self.successors[waiting.pop()]) - seen
            seen |= new
            waiting += new
        return tuple(sorted(seen))

    @property
    def straight(self) -> list[Instruction]:
        """All that can run outside of loops."""
        within = frozenset().union(*self.loops)
        return [x for block in self.reached if block not in within for x in self.blocks[block]]

    @cached_property
    def loops(self) -> tuple[frozenset[int], ...]:
        """Natural loops, by the address of their head: the blocks that lead back to it."""
        dominators = self._dominators
        before: dict[int, set[int]] = {block: set() for block in self.reached}
        for block in self.reached:
            for after in self.successors[block]:
                before[after].add(block)
        bodies: dict[int, set[int]] = {}
        for block in self.reached:
            for head in set(self.successors[block]) & dominators[block]:
                body, waiting = bodies.setdefault(head, {head}), [block]
                while waiting:
                    if (inside := waiting.pop()) not in body:
                        body.add(inside)
                        waiting += before[inside]
        return tuple(frozenset(bodies[head]) for head in sorted(bodies))

    @cached_property
    def _dominators(self) -> dict[int, set[int]]:
        """The blocks that every way to a block leads through, itself among them."""
        found = {block: set(self.reached) for block in self.reached} | {0: {0}}
        changed = True
        while changed:
            changed = False
            for block in self.reached[1:]:
                ways = [found[b] for b in self.reached if block in self.successors[b]]
                now = set.intersection(*ways) | {block}
                changed |= now != found[block]
                found[block] = now
        return found

    def rounds_of(self, loop: frozenset[int]) -> dict[int, tuple[int, int]]:
        """The fewest and the most instructions of the ways from a loop's head to itself that meet
        no block twice, by the products on tensor cores that a way executes: a loop within it
        counts as one round.
        """
        head = next(x for x in loop if all(x in self._dominators[block] for block in loop))
        known: dict[int, dict[int, tuple[int, int]]] = {}

        def ways(block: int) -> dict[int, tuple[int, int]]:
            if block not in known:
                onward = [{0: (0, 0)}] if head in self.successors[block] else []
                inside = (x for x in self.successors[block] if x in loop and x != head)
                onward += [ways(x) for x in inside if x not in self._dominators[block]]
                size = len(self.blocks[block])
                own = sum(x.name in PRODUCTS for x in self.blocks[block])
                found: dict[int, tuple[int, int]] = {}
                for products, (fewest, most) in ((n, w) for o in onward for n, w in o.items()):
                    low, high = found.get(products + own, (size + fewest, size + most))
                    found[products + own] = min(low, size + fewest), max(high, size + most)
                known[block] = found
            return known[block]

        return dict(sorted(ways(head).items()))

    @property
    def inner_loops(self) -> list[list[Instruction]]:
        """The instructions of loops that hold no other; what merely waits is no loop."""
        loops = [loop for loop in self.loops if not self._waits(loop)]
        inner = [loop for loop in loops if not any(other < loop for other in loops)]
        return [[x for block in sorted(loop) for x in self.blocks[block]] for loop in inner]

    def _waits(self, loop: frozenset[int]) -> bool:
        """Whether a loop asks a barrier in shared memory, or for registers, again and again."""
        names = {instruction.name for block in loop for instruction in self.blocks[block]}
        return names <= {"SYNCS", "USETMAXREG", "BRA", "NANOSLEEP", "NOP", "IMAD", "MOV", "PLOP3"}


def parse(text: str) -> list[Function]:
    """The functions in what `nvdisasm --print-code` has printed."""
    functions, name, lines = [], None, []
    for line in [*text.splitlines(), ".section .text.end"]:
        if found := _FUNCTION.match(line):
            if name is not None:
                functions.append(_function(name, lines))
            name, lines = found.group(1), []
        elif name is not None:
            lines.append(line)
    return functions


def _function(name: str, lines: list[str]) -> Function:
    """The control flow of one function's lines."""
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for line in lines:
        if label := _LABEL.match(line):
            if blocks[-1]:
                blocks.append([])
            labels[label.group(1)] = len(blocks) - 1
        elif found := _INSTRUCTION.match(line):
            address, predicate, opcode, operands = found.group(
                "address", "predicate", "opcode", "operands"
            )
            instruction = Instruction(int(address, 16), opcode, operands, predicate)
            blocks[-1].append(instruction)
            if instruction.target or instruction.name in _ENDS:
                blocks.append([])
    if not blocks[-1]:
        blocks.pop()
    successors = []
    for index, block in enumerate(blocks):
        last = block[-1]
        after = [] if last.ends or index + 1 == len(blocks) else [index + 1]
        successors.append((*after, *([labels[last.target]] if last.target in labels else [])))
    return Function(name, tuple(map(tuple, blocks)), tuple(successors))
