"""Every Triton kernel under every launch configuration, compiled for devices that are not here.

`make test` compiles each kernel for sm_90 as the Triton of this environment does; with
`ARGS="-m full"` that compiles every configuration and every branch for sm_90, and for the other
devices what half floats take up to head dim 128, and the oldest Triton that the kernels work with
compiles the latter for the device that it will meet, sm_90. `make kernels` compiles every
configuration for every device with both; the test of the sources' hashes says when it must.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from dense_attn import _kernel_report
from dense_attn._kernel_hashes import kernel_hashes
from dense_attn.benchmarks.compiled import ahead_of_time, kernel_calls, kernel_table
from dense_attn.triton_kernels import configs, layout_attention, reversible, sega
from dense_attn.triton_kernels.sega import selection

ROOT = Path(__file__).resolve().parents[2]
BESIDE = sorted((ROOT / ".venv").glob("triton-*"))
COMMITTED = ROOT / "benchmarks" / "results" / "kernels.json"
FEW_TARGETS = ("sm_90",)
OTHERS = ("this", "oldest")  # Tritons that compile more than the smallest calls
Table = dict[str, Any]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, not found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def smallest() -> list[kernel_calls.Attention | kernel_calls.Other]:
    """Calls that together launch every kernel for sm_90."""
    common = (call for call in kernel_calls.few() if call.target == "sm_90")
    return [call for call in common if getattr(call, "head_dim", 40) == 40]


@pytest.fixture(
    scope="module", params=["smallest", *(pytest.param(x, marks=pytest.mark.full) for x in OTHERS)]
)
def table(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Table:
    if request.param == "smallest":
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
            rows = [row for call in smallest() for row in kernel_table.compile_call(call)]
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


def reached(row: dict[str, Any]) -> tuple:
    """The row of `configs` that a kernel was launched under, which must have its tile."""
    kernel = row["kernel"].removeprefix("layout_attention_").removesuffix("_kernel")
    precision = "half" if row["dtype"] != "float32" else "tf32" if row["tf32"] else "ieee"
    rows = kernel_calls.tables()[kernel, row["target"], precision]
    largest, config = next(item for item in rows.items() if row["head_dim"] <= item[0])
    block_m, block_n = map(int, row["tile"].split("x"))
    assert block_m == config.BLOCK_M
    assert (
        block_n == config.BLOCK_N or kernel == "row_fwd"
    )  # the number of keys, whatever the table says
    assert (row["warps"], row["stages"]) == (config.num_warps, config.num_stages)
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
    for kernel, target, precision, d in rows_of_configs():
        rare = target != "sm_90" and (precision != "half" or d > 128)
        if (kernel, target) == ("row_fwd", "gfx942"):
            rare = precision == "half"
        if rare:
            wanted.remove((kernel, target, precision, d))
    assert {reached(row) for row in attention(table["rows"])} == wanted


def test_the_committed_table_has_every_configuration(committed: Table) -> None:
    for version in {row["triton"] for row in committed["rows"]}:
        rows = [row for row in attention(committed["rows"]) if row["triton"] == version]
        assert {reached(row) for row in rows} == rows_of_configs()


def test_every_kernel_is_compiled(table: Table) -> None:
    """For each device."""
    sources = "".join(path.read_text() for path in (ROOT / "triton_kernels").rglob("*.py"))
    kernels = re.findall(r"^def (\w+_kernel)\(", sources, re.M)
    compiled = {(row["kernel"], row["target"]) for row in table["rows"]}
    assert compiled == {(kernel, target) for kernel in kernels for target in targets_of(table)}


def test_no_rule_is_broken(table: Table) -> None:
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
    assert [kernel_table.name(row) for row in committed["rows"] if kernel_table.faults(row)] == []


def test_results_of_other_sources_are_told() -> None:
    """No failure, and shown as the reason of a skip: nobody can run a GPU at will."""
    headers = {name: result["header"] for name, result in _kernel_report.results().items()}
    if stale := _kernel_report.stale(headers):
        pytest.skip("; ".join(stale))


def test_the_stale_are_told_from_the_fresh() -> None:
    fresh = {"device": "Some GPU", "kernels": kernel_hashes()}
    old = fresh | {"kernels": fresh["kernels"] | {"sega/mask.py": "0" * 16}}
    headers = {
        "new.json": fresh,
        "old.json": old,
        "dry.json": old | {"dry_run": True},
        "cpu.json": {"device": "CPU"},
    }
    assert _kernel_report.stale(headers) == ["old.json: Some GPU ran other sources of sega/mask.py"]


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
        row = next(
            row for row in committed["rows"] if row["target"] == target and kind in row["matrix"]
        )
        assert kernel_table.faults(row | {"matrix": {"mma.other": 4}}) == [f"no {kind}"]


def test_warp_groups_are_in_the_machine_code() -> None:
    """The PTX calls them wgmma, the binary for sm_90 HGMMA."""
    with ahead_of_time.compiled("sm_90") as launches:
        kernel_calls.Attention("sm_90", "row_fwd", 64)()
    (launch,) = launches
    assert launch.matrix["wgmma.mma_async"] > 0
    assert ahead_of_time.inspect(launch.binary, "--dump-sass").count("HGMMA") > 0


def test_what_is_compiled_is_what_is_launched() -> None:
    """Strides with other divisors are kernels of their own; sizes alike are not."""
    q, words, numbers = (
        torch.empty(1, 2, 512, 64, device="meta", dtype=torch.bfloat16) for _ in range(3)
    )
    words, numbers = (
        words.new_empty(512, dtype=torch.int32),
        numbers.new_empty(1, 2, 512, dtype=torch.float32),
    )
    keys = q[:, :, :32]
    with ahead_of_time.compiled("sm_90") as launches:
        for rows in (q, q.clone(), q.new_empty(1, 2, 512, 65)[..., :64]):
            layout_attention.layout_attention_fwd(
                rows, keys, keys, words, words[:32], numbers, "max", 1.0
            )
    assert [launch.kernel for launch in launches] == ["layout_attention_row_fwd_kernel"] * 2


def test_long_rows_keep_to_the_first_axis_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others hold 65,535 programs."""
    grids = []

    class Recorder:
        def __getitem__(self, grid: tuple) -> Callable:
            return lambda *_, **__: grids.append(grid)

    monkeypatch.setattr(selection, "long_thresholds", lambda *_: None)
    for kernel in ("mask_kernel", "sega_combine_kernel"):
        monkeypatch.setattr(sega, kernel, Recorder())
    x = torch.empty(1, 2**27, device="meta")
    sega.percentile_mask(x, 0.9)
    each = {"edit_guidance_scale": [5.0], "edit_threshold": [0.9], "weights": [1.0]}
    each |= {"partials": [0.0], "all_warm": True, "reverse": [False]}
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    eps = x[None]
    sega.sega_guidance(eps, eps, eps[None], eps, **each, **numbers)
    assert len(grids) == 2
    assert all(len(grid) == 1 and grid[0] >= 2**27 // sega.TILE for grid in grids)
