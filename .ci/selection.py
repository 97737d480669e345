"""The cells of large test matrices that `make test` takes; all others are marked `full`.

A test of several axes and many cells is a matrix. The cells that are not `full` show every value of
every axis, each about as often, and as many pairs of values as they can. Cells marked `core` are
chosen among themselves, so that a run of those alone shows all of their values too.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import combinations

import pytest

BEYOND = pytest.mark.full("beyond a covering")
LARGE = 32  # the most cells of a test that is no matrix
PARTS = ("not full", pytest.param("full", marks=pytest.mark.full))  # of a test that runs others
Cell = dict[str, object]  # a value by the name of its axis


def covering(cells: Sequence[Cell]) -> set[int]:
    """The positions of cells that together show every value of every axis."""
    named = [keys(cell) for cell in cells]
    holders: dict[tuple, list[int]] = defaultdict(list)
    for position, values in enumerate(named):
        for value in values:
            holders[value].append(position)
    shown, pairs, chosen = Counter(), Counter(), set()

    def seen(position: int) -> tuple[int, int]:
        values = named[position]
        return sum(shown[x] for x in values), sum(pairs[x] for x in combinations(values, 2))

    for value in sorted(holders, key=lambda value: len(holders[value])):  # the rarest first
        if not shown[value]:
            best = min(holders[value], key=seen)
            chosen.add(best)
            shown.update(named[best])
            pairs.update(combinations(named[best], 2))
    return chosen


def keys(cell: Cell) -> list[tuple]:
    """The axes of a cell, each with something that tells its value from the axis's others."""
    plain = (str, int, float)
    return [
        (axis, type(value), value if isinstance(value, plain) else id(value))
        for axis, value in cell.items()
    ]


def is_matrix(cells: Sequence[Cell], costly: bool = False) -> bool:
    """Whether a test has many cells, or costly ones, and several of each of its values."""
    lengths = Counter(axis for axis, *_ in {key for cell in cells for key in keys(cell)})
    return (costly or len(cells) > LARGE) and len(cells) >= 2 * max(lengths.values())


def mark(items: Sequence[pytest.Function]) -> None:
    """Mark `full` what lies outside of the covering cells of each matrix.

    A cell that is skipped shows nothing, and costs nothing either.
    """
    tests = defaultdict(list)
    for item in items:
        if hasattr(item, "callspec") and item.get_closest_marker("skip") is None:
            core = item.get_closest_marker("core") is not None
            tests[item.path, item.originalname, core].append(item)
    for test in tests.values():
        cells = [item.callspec.params for item in test]
        if is_matrix(cells, test[0].get_closest_marker("costly") is not None):
            covers = covering(cells)
            for position, item in enumerate(test):
                if position not in covers:
                    item.add_marker(BEYOND)
