"""Every Triton kernel under every launch configuration, compiled for devices that are not here.

`make test` holds the committed table to every rule. With `ARGS="-m full"` each kernel is compiled
for sm_90 as the Triton of this environment does, then every configuration and every branch, and for
the other devices what half floats take up to head dim 128; the oldest Triton that the kernels work
with compiles the latter for the device that it will meet, sm_90. `make kernels` compiles every
configuration for every device with both; the test of the sources' hashes says when it must.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from dense_attn import _kernel_report
from dense_attn._kernel_hashes import kernel_hashes
from dense_attn.benchmarks.compiled import (
    ahead_of_time,
    counts,
    kernel_calls,
    kernel_table,
)
from dense_attn.benchmarks.host_cost.launches import SPECIALISED
from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels.parts import head_parts, next_power_of_2

ROOT = Path(__file__).resolve().parents[2]
BESIDE = sorted((ROOT / ".venv").glob("triton-*"))
COMMITTED = ROOT / "benchmarks" / "results" / "kernels.json"
FEW_TARGETS = ("sm_90",)
Table = dict[str, Any]
# The first compiles for most of a minute, the others for eight and three; a changed kernel needs
# `make kernels`, which does all of it: the test of the hashes says so.
SMALLEST = pytest.param("smallest", marks=pytest.mark.full)
ALL_OF_THIS = pytest.param("this", marks=[pytest.mark.full, pytest.mark.long])
OLDEST = pytest.param("oldest", marks=[pytest.mark.full, pytest.mark.long])


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, not found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def smallest() -> list[kernel_calls.Attention | kernel_calls.Other]:
    """Calls that together launch every kernel for sm_90."""
    common = (call for call in kernel_calls.few() if call.target == "sm_90")
    return [call for call in common if getattr(call, "head_dim", 40) == 40]


@pytest.fixture(scope="module", params=[SMALLEST, ALL_OF_THIS, OLDEST])
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    if request.param == "smallest":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
            # Of attention's loops, facts are certain; reading the code of all takes a third more.
            calls = [(call, isinstance(call, kernel_calls.Attention)) for call in smallest()]
            rows = [row for call in calls for row in kernel_table.compile_call(*call)]
        return {"calls": "smallest", "rows": rows}
    if request.param == "this":
        return kernel_table.compile_elsewhere() | {"calls": "tested"}
    if not BESIDE:
        pytest.skip('no other Triton is here: make test ARGS="-m full" installs it')
    return kernel_table.compile_elsewhere(BESIDE[0], FEW_TARGETS, "few") | {"calls": "few"}


@pytest.fixture(scope="module")
def committed() -> Table:
    return kernel_table.read(COMMITTED)


def rows_of_configs() -> set[tuple]:
    """(kernel, target, precision, largest head dim) of every row."""
    return {(*kind, d) for kind, rows in kernel_calls.tables().items() for d in rows}


def kernel_of(row: dict[str, Any]) -> str:
    """An attention kernel by its short name."""
    return row["kernel"].removeprefix("layout_attention_").removesuffix("_kernel")


def reached(row: dict[str, Any]) -> tuple:
    """The row of `configs` that a kernel was launched under, which must have its tile."""
    kernel = kernel_of(row)
    precision = kernel_calls.precision_of(row["dtype"], row["tf32"])
    rows = kernel_calls.tables()[kernel, row["target"], precision]
    largest, config = next(item for item in rows.items() if row["head_dim"] <= item[0])
    block_m, block_n = map(int, row["tile"].split("x"))
    split = row["which"] == kernel_calls.SPLIT and kernel == "bwd_kv"
    if row["seqlen"] <= kernel_calls.FEW or split:
        config = kernel_calls.half_of(kernel, config)
    assert block_m == config.BLOCK_M
    assert (
        block_n == config.BLOCK_N or kernel == "row_fwd"
    )  # the number of keys, whatever the table says
    groups = 3 if config.specialised else 1  # one fetches, two weigh
    assert (row["warps"], row["stages"]) == (groups * config.num_warps, config.num_stages)
    return kernel, row["target"], precision, largest


def targets_of(table: Table) -> tuple[str, ...]:
    """The devices that this table must be of."""
    return tuple(ahead_of_time.TARGETS) if table["calls"] == "tested" else FEW_TARGETS


def attention(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those under a table's row, which unaligned head dims are not."""
    return [
        row
        for row in rows
        if row["kernel"].startswith("layout_attention") and row["head_dim"] % 8 == 0
    ]


def test_every_table_is_known() -> None:
    """Every dictionary of configurations in `configs` is among those that must be reached."""

    def leaves(table: dict) -> list[int]:
        first = next(iter(table.values()))
        return (
            [id(table)]
            if isinstance(first, configs.Config)
            else [id(rows) for rows in table.values()]
        )

    public = {
        name: value for name, value in vars(configs).items() if name.isupper() and name[0] != "_"
    }
    tables = [
        value
        for name, value in public.items()
        if isinstance(value, dict) and not name.startswith("UNALIGNED")
    ]
    assert {leaf for table in tables for leaf in leaves(table)} == set(
        map(id, kernel_calls.tables().values())
    )


def test_every_configuration_is_compiled(table: Table) -> None:
    """But those that the newer Triton takes up to a minute for, and beside sm_90 the rare ones."""
    wanted = rows_of_configs()
    if targets_of(table) == FEW_TARGETS:
        few = {40, 128} if table["calls"] == "few" else {40}
        assert {row["head_dim"] for row in attention(table["rows"])} >= few
        assert {reached(row) for row in attention(table["rows"])} < wanted
        return
    tables = kernel_calls.tables()
    for kernel, target, precision, d in rows_of_configs():
        wide = d > 128 and d != min(tables[kernel, target, precision])
        rare = target != "sm_90" and (precision != "half" or wide)
        if (kernel, target) == ("row_fwd", "gfx942"):
            rare = precision == "half"
        if rare:
            wanted.remove((kernel, target, precision, d))
    assert {reached(row) for row in attention(table["rows"])} == wanted


def test_the_committed_table_has_every_configuration(committed: Table) -> None:
    for version in {row["triton"] for row in committed["rows"]}:
        rows = [row for row in attention(committed["rows"]) if row["triton"] == version]
        wanted = rows_of_configs()
        if version.startswith("3.6"):  # which cannot compile them
            wanted = {row for row in wanted if row[:2] != ("fwd", "gfx942")}
        assert {reached(row) for row in rows} == wanted


def test_every_kernel_is_compiled(table: Table) -> None:
    """For each device, those of specialised warps where there are any."""
    sources = "".join(path.read_text() for path in (ROOT / "triton_kernels").rglob("*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", sources, re.M)
    compiled = {(row["kernel"], row["target"]) for row in table["rows"]}
    wanted = {(kernel, target) for kernel in kernels for target in targets_of(table)}
    wanted = {x for x in wanted if x[0] not in SPECIALISED or x[1] in configs.SPECIALISED}
    assert compiled == wanted


def test_no_rule_is_broken(table: Table) -> None:
    assert table.get("failed", []) == []
    assert {row["target"] for row in table["rows"]} == set(targets_of(table))
    assert [
        f"{kernel_table.name(row)}: {fault}"
        for row in table["rows"]
        for fault in kernel_table.faults(row)
    ] == []


def test_the_committed_table_is_of_now(table: Table, committed: Table) -> None:
    """`make kernels` renews it."""
    assert kernel_table.differences(committed["rows"], table["rows"]) == []


def test_the_committed_table_is_of_these_sources(committed: Table) -> None:
    assert committed["header"]["kernels"] == kernel_hashes(), "make kernels renews the table"
    assert committed["failed"] == []
    assert [kernel_table.name(row) for row in committed["rows"] if kernel_table.faults(row)] == []


def sides(*tables: Table) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of attention whose loops are counted, beside their own facts and plain attention's."""
    rows = [row for table in tables for row in attention(table["rows"]) if "plain" in row]
    return [(row, facts) for row in rows for facts in (row, row["plain"])]


def test_every_loop_is_found(table: Table, committed: Table) -> None:
    """Forward, for matched tiles, those in doubt and the others, which "mask" does not visit;
    specialised warps visit tiles of one population in the same loop. Backward, for pairs, and under
    rules that look at a row's extremes for what goes through them.
    """
    assert len(sides(table)) >= 8
    several = {"specialised_fwd": 2, "row_fwd": 0}
    for row, facts in sides(table, committed):
        kernel, ours = kernel_of(row), facts is row
        extremes = row["modulation"] in ("range", "max")
        loops = several | {"fwd": 2 if row["modulation"] == "mask" else 3}
        loops |= {"bwd_q": 1 + extremes, "bwd_kv": 1 + 3 * extremes}
        loops = loops[kernel]
        if ours and kernel == "bwd_q" and row["dtype"] == "float32" and facts["loops"] == 1:
            loops = 1  # over few candidates, unrolled
        assert facts["loops"] == (loops if ours or kernel == "row_fwd" else 1), row
        assert len(facts["bodies"]) == max(1, facts["loops"])
        assert not any("unknown" in body["kinds"] for body in facts["bodies"]), row


def products_of_a_round(row: dict[str, Any], ours: bool, loop: int) -> int:
    """Multiply-adds for each score: forward, tiles in doubt have two accumulators, and narrow ones
    are summed by products with 16 columns of ones, by specialised warps those of tiles in doubt.
    """
    kernel = kernel_of(row)
    tiled = kernel in ("fwd", "specialised_fwd")
    way = "fwd" if tiled else kernel if ours else "bwd_kv"
    columns = sum(head_parts(way, row["target"], "half", row["head_dim"]))
    if not tiled or not ours:
        return {"bwd_q": 3, "bwd_kv": 4}.get(kernel, 2) * columns
    special = kernel == "specialised_fwd"
    states = 2 if loop == 1 and (special or row["modulation"] != "mask") else 1
    summed = columns <= 64 and (loop == 1 or not special)
    return columns + states * (columns + 16 * summed)


def test_a_round_has_the_products_of_a_tile(table: Table, committed: Table) -> None:
    """A round of each loop is one tile, and all of its products are counted; warps that have no 16
    rows of their own repeat some, in plain attention too, and scores of half tiles of both
    populations are made twice on sm_80.
    """
    for row, facts in sides(table, committed):
        if row["dtype"] == "float32" or row["seqlen"] == 1:  # a key alone: the others' are dropped
            continue
        tile, kernel = [int(side) for side in row["tile"].split("x")], kernel_of(row)
        if facts is not row:
            tile[1] = next_power_of_2(tile[1])  # without a second part of keys
        alone = tile[kernel == "bwd_kv"] >= 16 * row["warps"]
        bodies = facts["bodies"][:1] if kernel.startswith("bwd") else facts["bodies"]
        for loop, body in enumerate(bodies):
            needed = math.prod(tile) * products_of_a_round(row, facts is row, loop)
            of_warp = (n * counts.multiply_adds(shape) for shape, n in body["tensor"].items())
            weigh = row["warps"] * 2 // 3 if kernel == "specialised_fwd" else row["warps"]
            made = weigh * sum(of_warp)
            twice = loop == 1 and (row["target"], row["seqlen"]) == ("sm_80", kernel_calls.FEW)
            most = 1.4 if twice else 1 if alone else 2.5
            assert needed <= made <= most * needed, row


def test_what_is_kept_in_local_memory_is_a_spill(table: Table, committed: Table) -> None:
    for row, facts in sides(table, committed):
        local = any("local" in body["kinds"] for body in facts["bodies"])
        assert not local or facts["spills"] > 0, row


def test_copies_in_flight(table: Table) -> None:
    """Facts, not wishes: 0 is a loop that waits for all of its copies at once."""
    ours = {"fwd": [2, 3, 2], "row_fwd": [], "bwd_q": [3], "bwd_kv": [5], "specialised_fwd": []}
    plain = {"fwd": [2], "row_fwd": [], "bwd_q": [4], "bwd_kv": [6], "specialised_fwd": [2]}
    found = 0
    for row, facts in sides(table):
        if row["target"] == "sm_90" and row["head_dim"] == 40 and row["layout"] == "[B,H,N,D]":
            waits = [wait for body in facts["bodies"] for wait in body.get("copy_waits", ())]
            assert waits == (ours if facts is row else plain)[kernel_of(row)], row
            found += 1
    assert found >= 8


def test_the_model_is_shown(table: Table) -> None:
    """Beside plain attention, and not judged."""
    lines = [_kernel_report._counted(row) for row, facts in sides(table) if facts is row]
    print("\n".join(_kernel_report.grid([_kernel_report.MODEL_COLUMNS, *lines])))
    column = _kernel_report.MODEL_COLUMNS.index("issue")
    assert all(re.fullmatch(r"[\d ]+ / \d+", line[column]) for line in lines)


def test_a_changed_number_is_noticed(committed: Table) -> None:
    row = committed["rows"][0]
    for number in kernel_table.NUMBERS:
        changed = row | {number: row[number] + 1}
        assert kernel_table.differences([row], [changed]) != []
    for what in kernel_table.MODELLED:
        assert kernel_table.differences([row], [row | {what: "another"}]) != []
    assert kernel_table.differences([row], [row | {"target": "sm_70"}]) != []
    assert kernel_table.differences([row], [row]) == []
