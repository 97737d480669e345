"""Every Triton kernel under every launch configuration, compiled ahead of time for devices that are not here.

Compiled twice: with the Triton of this environment and with the oldest that the kernels work with, which `make test`
installs beside it. Both compile every configuration at its largest head dim, and on one device every branch of the
layout attention kernels; `make kernels` compiles more head dims, and the branches on all devices, which takes three
times as long.
"""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dense_attn import _kernel_report
from dense_attn._kernel_hashes import kernel_hashes
from dense_attn.benchmarks import ahead_of_time, kernel_calls, kernel_table
from dense_attn.triton_kernels import configs, layout_attention, reversible

ROOT = Path(__file__).resolve().parents[1]
BESIDE = sorted((ROOT / ".venv").glob("triton-*"))
COMMITTED = ROOT / "benchmarks" / "results" / "kernels.json"
TABLES = {
    "layout_attention_fwd_kernel": configs.FORWARD,
    "layout_attention_row_fwd_kernel": configs.ROW_FORWARD,
    "layout_attention_bwd_q_kernel": configs.BACKWARD_Q,
    "layout_attention_bwd_kv_kernel": configs.BACKWARD_KV,
}
Table = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is compiled, not found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture(scope="module", params=["this", "oldest"])
def table(request: pytest.FixtureRequest) -> Table:
    if request.param == "this":
        return kernel_table.compile_elsewhere()
    if not BESIDE:
        pytest.skip("no other Triton is installed beside this one: make test does that")
    return kernel_table.compile_elsewhere(BESIDE[0])


@pytest.fixture(scope="module")
def committed() -> Table:
    return kernel_table.read(COMMITTED)


def wanted() -> set[tuple]:
    """Every row of every table."""
    rows = {
        (kernel, target, largest, config)
        for kernel, table in TABLES.items()
        for target, by_head_dim in table.items()
        for largest, config in by_head_dim.items()
    }
    return rows | {(kernel, "float32", *row) for kernel in TABLES for row in configs.FLOAT32.items()}


def reached(row: dict[str, Any]) -> tuple:
    """The row of a table that a kernel was launched with; the launcher's tile tells, not its call."""
    exact = row["dtype"] == "float32" and not row["tf32"]
    by_head_dim = configs.FLOAT32 if exact else TABLES[row["kernel"]][row["target"]]
    largest, config = next(item for item in by_head_dim.items() if row["head_dim"] <= item[0])
    block_m, block_n = map(int, row["tile"].split("x"))
    if row["kernel"] == "layout_attention_row_fwd_kernel":
        block_n = config.BLOCK_N  # the number of keys, whatever the table says
    launched = configs.Config(block_m, block_n, row["warps"], row["stages"], config.parks)
    return row["kernel"], "float32" if exact else row["target"], largest, launched


def test_every_configuration_is_compiled(table: Table) -> None:
    """But those that the newer Triton takes up to a minute for, which the older compiles."""
    older = table["header"]["versions"]["triton"].startswith("3.6.")
    slow = {row for row in wanted() if row[:2] == ("layout_attention_row_fwd_kernel", "gfx942")}
    assert {reached(row) for row in table["rows"] if row["kernel"] in TABLES} == wanted() - (set() if older else slow)


def test_the_committed_table_has_every_configuration(committed: Table) -> None:
    for version in {row["triton"] for row in committed["rows"]}:
        rows = [row for row in committed["rows"] if row["triton"] == version and row["kernel"] in TABLES]
        assert {reached(row) for row in rows} == wanted()


def test_every_kernel_is_compiled(table: Table) -> None:
    """For each device."""
    sources = "".join(path.read_text() for path in (ROOT / "triton_kernels").glob("*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", sources, re.M)
    compiled = {(row["kernel"], row["target"]) for row in table["rows"]}
    assert compiled == {(kernel, target) for kernel in kernels for target in ahead_of_time.TARGETS}


@pytest.mark.parametrize("target", ahead_of_time.TARGETS)
def test_no_rule_is_broken(table: Table, target: str) -> None:
    rows = [row for row in table["rows"] if row["target"] == target]
    assert rows
    assert [f"{kernel_table.name(row)}: {fault}" for row in rows for fault in kernel_table.faults(row)] == []


def test_the_committed_table_is_of_now(table: Table, committed: Table) -> None:
    """`make kernels` renews it."""
    assert kernel_table.differences(committed["rows"], table["rows"]) == []


def test_the_committed_table_is_of_these_sources(committed: Table) -> None:
    assert committed["header"]["kernels"] == kernel_hashes(), "make kernels renews the table"
    assert [kernel_table.name(row) for row in committed["rows"] if kernel_table.faults(row)] == []


def test_results_of_other_sources_are_told() -> None:
    """Not a failure: nobody can run a GPU at will."""
    for line in _kernel_report.stale(_kernel_report.headers()):
        warnings.warn(line, stacklevel=1)


def test_the_stale_are_told_from_the_fresh() -> None:
    fresh = {"device": "Some GPU", "kernels": kernel_hashes()}
    old = fresh | {"kernels": fresh["kernels"] | {"sega.py": "0" * 16}}
    results = {"new.json": fresh, "old.json": old, "dry.json": old | {"dry_run": True}, "cpu.json": {"device": "CPU"}}
    assert _kernel_report.stale(results) == ["old.json: Some GPU ran other sources of sega.py"]


def test_a_changed_number_is_noticed(committed: Table) -> None:
    row = committed["rows"][0]
    for number in kernel_table.NUMBERS:
        changed = row | {number: row[number] + 1}
        assert kernel_table.differences([row], [changed]) != []
    assert kernel_table.differences([row], [row | {"target": "sm_70"}]) != []
    assert kernel_table.differences([row], [row]) == []


def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a tile too large for four warps."""
    monkeypatch.setitem(configs.FORWARD["sm_90"], 96, configs.Config(128, 64, 4, 3))
    rows = kernel_table.compile_call(kernel_calls.Attention("sm_90", "fwd", 64))
    assert any("spilled" in fault for row in rows for fault in kernel_table.faults(row))


def test_too_much_shared_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ahead_of_time.SHARED_LIMITS, "sm_90", 1024)
    rows = kernel_table.compile_call(kernel_calls.Attention("sm_90", "row_fwd", 40))
    assert any("shared memory" in fault for row in rows for fault in kernel_table.faults(row))


def test_fusion_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reversible.LAUNCH, "enable_fp_fusion", True)
    rows = kernel_table.compile_call(kernel_calls.Other("sm_90", "reversible"))
    assert any("fused multiply-adds" in fault for row in rows for fault in kernel_table.faults(row))


def test_missing_matrix_instructions_are_seen(committed: Table) -> None:
    for target, kind in kernel_table.MATRIX.items():
        row = next(row for row in committed["rows"] if row["target"] == target and kind in row["matrix"])
        assert kernel_table.faults(row | {"matrix": {"mma.other": 4}}) == [f"no {kind}"]


def test_warp_groups_are_in_the_machine_code() -> None:
    """What the PTX calls wgmma, the binary for sm_90 calls HGMMA."""
    with ahead_of_time.compiled("sm_90") as launches:
        kernel_calls.Attention("sm_90", "row_fwd", 64)()
    (launch,) = launches
    assert launch.matrix["wgmma.mma_async"] > 0
    assert ahead_of_time.inspect(launch.binary, "--dump-sass").count("HGMMA") > 0


def test_what_is_compiled_is_what_is_launched() -> None:
    """Layouts of memory that differ in the strides' divisors are kernels of their own; sizes alike are not."""
    q, words, numbers = (torch.empty(1, 2, 512, 64, device="meta", dtype=torch.bfloat16) for _ in range(3))
    words, numbers = words.new_empty(512, dtype=torch.int32), numbers.new_empty(1, 2, 512, dtype=torch.float32)
    keys = q[:, :, :32]
    with ahead_of_time.compiled("sm_90") as launches:
        for rows in (q, q.clone(), q.new_empty(1, 2, 512, 65)[..., :64]):
            layout_attention.layout_attention_fwd(rows, keys, keys, words, words[:32], numbers, "max", 1.0)
    assert [launch.kernel for launch in launches] == ["layout_attention_row_fwd_kernel"] * 2
