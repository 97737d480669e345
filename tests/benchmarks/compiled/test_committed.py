"""The table of kernels that is committed: its bars, what devices and rows ask of it, and what the
docs say of it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from dense_attn.benchmarks.compiled import (
    bars,
    counts,
    kernel_calls,
    kernel_table,
    occupancy,
    page,
)
from dense_attn.benchmarks.layout_attention.workloads import WORKLOADS
from dense_attn.triton_kernels import configs

ROOT = Path(__file__).resolve().parents[3]
TABLE = kernel_table.read(ROOT / "benchmarks" / "results" / "kernels.json")
NEWEST = TABLE["header"]["versions"]["triton"]
(OLDEST,) = {row["triton"] for row in TABLE["rows"]} - {NEWEST}
LOOPS = ("untested tile", "mixed tile", "forward in region order", "forward in raster order")
FWD, ROW, *BWD = (f"{x}, of Triton {NEWEST}'s" for x in ("fwd", "row_fwd", "bwd_q", "bwd_kv"))
# The oldest Triton compiles a configuration once, for the widest heads that it is for.
NOT_COMPILED = {
    ("sm_80", 40): {*LOOPS, "backward", FWD, *BWD},
    ("sm_80", 64): {"backward", ROW, *BWD},
    ("sm_90", 64): {"backward", ROW, *BWD},
    ("sm_90", 128): {ROW},
}
MISSED: dict[tuple[str, str, int, str], float] = {}
Row = dict[str, Any]


def prose(file: str) -> str:
    """A page without its line breaks."""
    return " ".join((ROOT / file).read_text("utf-8").split())


def rows_of(kernel: str, **facts: object) -> list[Row]:
    """Rows of a kernel of layout attention with these facts."""
    name = {"kernel": f"layout_attention_{kernel}_kernel"}
    return [row for row in TABLE["rows"] if (name | facts).items() <= row.items()]


def default_rows(kernel: str, target: str, bare: bool = False) -> list[Row]:
    """Rows of default calls, of every head dim."""
    which = kernel.removesuffix("_q").removesuffix("_kv")
    facts = kernel_calls.Attention(target, which, 0, bare=bare).facts
    return rows_of(kernel, **{name: fact for name, fact in facts.items() if name != "head_dim"})


def test_the_bars_are_those_of_the_rows() -> None:
    assert TABLE["bars"] == bars.bars(TABLE["rows"])


def test_every_bar_is_there_and_each_miss_is_known() -> None:
    wanted = {
        (target, triton, head_dim, what)
        for target in bars.SLACK
        for triton in (NEWEST, OLDEST)
        for head_dim in bars.HEAD_DIMS
        for what in (*LOOPS, "backward", *((FWD, ROW, *BWD) if triton == OLDEST else ()))
    }
    wanted |= {("sm_90", triton, 40, "sd15-cross-64, of its copy") for triton in (NEWEST, OLDEST)}
    for (target, head_dim), absent in NOT_COMPILED.items():
        wanted -= {(target, OLDEST, head_dim, what) for what in absent}
    names = ("target", "triton", "head_dim", "what")
    found = {tuple(bar[name] for name in names): bar for bar in TABLE["bars"]}
    assert found.keys() == wanted
    assert len(found) == len(TABLE["bars"])
    assert {
        where: bar["value"] for where, bar in found.items() if bar["verdict"] != "holds"
    } == MISSED


def test_the_docs_have_the_table_and_the_bars() -> None:
    """Not a number of them is typed by hand."""
    assert page.table(TABLE["rows"], NEWEST) in (ROOT / "docs/measured.md").read_text("utf-8")
    assert f"{bars.said(TABLE['bars'])}." in prose("docs/measured.md")
    for value in MISSED.values():
        for file in ("docs/limits.md", "CHANGELOG.md"):
            assert f"{value} of plain attention's cycles, not {bars.BACKWARD}" in prose(file)


def test_bars_hold_where_keys_end_inside_a_tile() -> None:
    """No round of specialised warps looks for the end."""
    (row,) = rows_of("specialised_fwd", seqlen=4095, head_dim=64, triton=NEWEST)
    found = [*bars._of_call("sm_90", NEWEST, 64, {"fwd": row})]
    assert len(found) == len(LOOPS)
    assert [bar for bar in found if bar["value"] > bar["bound"]] == []


def test_limits_tell_which_small_grids_leave_processors_idle() -> None:
    """In half tiles too, of a prompt's keys, whose queries programs share."""
    workload, processors = WORKLOADS["sd15-cross-64"], occupancy.DEVICES["sm_90"].processors
    heads, keys = workload.batch * workload.num_heads, workload.seqlen_k
    config = configs.layout_attention_bwd("sm_90", "half", workload.head_dim)[1]
    half = configs.filling(config, keys, heads, processors, "BLOCK_N")
    assert half != config
    split = configs.splitting(half, workload.seqlen_q, keys, heads, processors)
    programs = heads * -(-keys // half.BLOCK_N) * split.splits
    said = f"77 keys of sd15-cross-64 is {programs} programs on {processors} processors"
    assert said in prose("docs/limits.md")


def test_small_devices_of_an_architecture_hold_its_tiles() -> None:
    """8.6, 8.9 and 12.0 have 99 KB a program."""
    row = rows_of("fwd", target="sm_80")[0]
    assert kernel_table.faults(row) == []
    (fault,) = kernel_table.faults(row | {"shared": 101_377})
    assert fault == "101377 bytes of shared memory, of 101376"


# Instructions of a warp for 16 rows of 77 keys, bare or with a log-sum-exp and statistics, by the
# widest heads.
MOST = {
    ("sm_80", True): {64: 1100},
    ("sm_90", True): {64: 1100},
    ("sm_80", False): {64: 1200, 128: 1450},
    ("sm_90", False): {64: 1100, 128: 1300},
}


@pytest.mark.parametrize(("target", "bare"), MOST)
def test_rows_of_a_prompt_are_bound_by_their_bytes(target: str, bare: bool) -> None:
    """77 keys: several programs share an SM, so that the loads of some overlap the work of others;
    by the model, 2.5 times a copy of what is read and written at most.
    """
    seen = set()
    for row in default_rows("row_fwd", target, bare):
        head_dim, (body,) = row["head_dim"], row["bodies"]
        most = next((n for widest, n in MOST[target, bare].items() if head_dim <= widest), None)
        if most is None or head_dim % 8:
            continue
        seen.add((row["triton"], head_dim))
        assert body["instructions"] <= most, row
        assert row["programs"] >= (4 if target == "sm_90" else 2), row
        if target == "sm_90" and head_dim <= 64:
            rows, device = 2 * 8 * 4096, occupancy.DEVICES["sm_90"]
            # The cycles of a tile are counted for 128 keys.
            cycles = max(body["cycles"].values()) * rows * 128 / counts.SCORES / device.processors
            moved = rows * (4 * head_dim + 20 * (not bare)) + 4 * 16 * 77 * head_dim
            assert cycles / bars.CLOCK <= bars.FEW_KEYS_BAR * moved / bars.COPY, row
    assert seen >= {(NEWEST, 64)} | ({(OLDEST, 40)} if target == "sm_90" else set())


def test_what_rows_of_a_prompt_take_is_said() -> None:
    bare, whole = (
        {
            row["head_dim"]: row["bodies"][0]["instructions"]
            for row in rows
            if row["triton"] == NEWEST
        }
        for rows in (default_rows("row_fwd", "sm_90", True), default_rows("row_fwd", "sm_90"))
    )
    assert (
        f"{bare[40]:,} instructions for 16 rows of 77 keys at 40 columns and {bare[64]:,} at 64; "
        f"with a log-sum-exp and statistics {whole[40]:,} and {whole[64]:,} (bar 1,100)"
    ) in prose("docs/measured.md")
