"""The tests that `make test` takes: no file is overlooked, every value of a matrix is seen."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from pathlib import Path

import pytest
import selection
from tree import ROOT

Collected = tuple[set[Path], list[pytest.Item]]


def cells(**axes: object) -> list[selection.Cell]:
    return [dict(zip(axes, values)) for values in product(*axes.values())]


def test_a_covering_shows_every_value_and_few_twice() -> None:
    given = cells(case="abcdefghijkl", dtype=range(4), flag=(True, False), backend=["cpu"])
    chosen = [given[position] for position in selection.covering(given)]
    assert len(chosen) == 12
    shown = [{axis: cell[axis] for axis in ("dtype", "flag")} for cell in chosen]
    assert [sum(cell["dtype"] == dtype for cell in shown) for dtype in range(4)] == [3] * 4
    assert [sum(cell["flag"] == flag for cell in shown) for flag in (True, False)] == [6] * 2
    assert len({tuple(cell.values()) for cell in shown}) == 8  # all pairs of the short axes


def test_values_are_told_apart_by_what_they_are() -> None:
    """1 is not True, and objects that cannot be hashed are values too."""
    lists = [[1], [1]]
    given = cells(x=(1, True, 1.0), y=lists)
    chosen = [given[position] for position in selection.covering(given)]
    assert {type(cell["x"]) for cell in chosen} == {int, bool, float}
    assert {id(cell["y"]) for cell in chosen} == set(map(id, lists))


def test_a_part_of_a_product_is_covered_too() -> None:
    given = [cell for cell in cells(x=range(6), y=range(7)) if cell["x"] != cell["y"]]
    chosen = [given[position] for position in selection.covering(given)]
    assert {cell["x"] for cell in chosen} == set(range(6))
    assert {cell["y"] for cell in chosen} == set(range(7))


def test_a_table_is_no_matrix() -> None:
    assert selection.is_matrix(cells(x=range(200), y="abc"))
    assert not selection.is_matrix(cells(x=range(3), y="abc"))
    assert not selection.is_matrix([{"x": i, "y": str(i)} for i in range(2000)])


def test_every_file_is_collected(collected: Collected) -> None:
    """Test files are all collected, also where folders hold files of one name."""
    files, _ = collected
    there = set((ROOT / "tests").rglob("test_*.py"))
    assert len(there) >= 60
    assert len({path.name for path in there}) < len(there)
    assert there - files == set()


def test_every_value_is_in_a_run_without_full(collected: Collected) -> None:
    """For every axis of every matrix; cells that are skipped show nothing."""
    _, items = collected
    shown, left = defaultdict(set), defaultdict(set)
    for item in items:
        full = item.get_closest_marker("full")
        if item.get_closest_marker("skip") is None and full in (None, selection.BEYOND.mark):
            params = getattr(item, "callspec", None) and item.callspec.params
            keys = {(item.originalname, *key) for key in selection.keys(params or {})}
            (left if full else shown)[item.path] |= keys
    assert sum(map(len, left.values())) > 300
    assert {path: left[path] - shown[path] for path in left if left[path] - shown[path]} == {}
