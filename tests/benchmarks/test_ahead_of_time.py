"""Kernels compiled for devices that are not here: what breaks a rule is seen, and what is compiled
is what is launched.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from dense_attn.benchmarks.compiled import (
    ahead_of_time,
    bars,
    counts,
    kernel_calls,
    kernel_table,
    model,
    plain_attention,
)
from dense_attn.triton_kernels import autotune, configs, layout_attention, reversible, sega
from dense_attn.triton_kernels.sega import selection

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = kernel_table.read(ROOT / "benchmarks" / "results" / "kernels.json")["rows"]


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are compiled, not found."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled_rows(call: kernel_calls.Attention | kernel_calls.Other) -> list[kernel_table.Row]:
    return kernel_table.compile_call(call, modelled=False)


@pytest.mark.full  # the committed table is held to the same rules
def test_spills_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a tile too large for four warps."""
    monkeypatch.setitem(configs.FORWARD["sm_90"], 64, configs.Config(128, 64, 4, 3))
    rows = compiled_rows(kernel_calls.Attention("sm_90", "fwd", 64, seqlen=512))
    assert any("spilled" in fault for row in rows for fault in kernel_table.faults(row))


def test_too_much_shared_memory_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ahead_of_time.SHARED_LIMITS, "sm_90", 1024)
    rows = compiled_rows(kernel_calls.Attention("sm_90", "row_fwd", 40))
    assert any("shared memory" in fault for row in rows for fault in kernel_table.faults(row))


def test_fusion_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(reversible.LAUNCH, "enable_fp_fusion", True)
    rows = compiled_rows(kernel_calls.Other("sm_90", "reversible"))
    assert any("fused multiply-adds" in fault for row in rows for fault in kernel_table.faults(row))


def waits_in_loops(assembly: str) -> list[int]:
    """Groups of copies that waits inside of loops leave in flight."""
    loops = re.finditer(r"(?ms)^(\$L__BB0_\d+):.*?\bbra\s+\1;", assembly)
    waits = (re.findall(r"cp\.async\.wait_group\D*(\d+);", loop.group()) for loop in loops)
    return [int(left) for found in waits for left in found]


def forward_waits(target: str, ordered: bool) -> list[int]:
    with ahead_of_time.compiled(target) as launches:
        kernel_calls.Attention(target, "fwd", 64, ordered=ordered, seqlen=512)()
    return waits_in_loops(launches[-1].assembly)


@pytest.mark.parametrize(
    ("target", "ordered"),
    [
        ("sm_80", True),
        pytest.param("sm_90", True, marks=pytest.mark.full),
        pytest.param("sm_90", False, marks=pytest.mark.full),
        pytest.param("sm_100", True, marks=pytest.mark.full),
    ],
)
def test_keys_are_fetched_two_tiles_ahead(target: str, ordered: bool) -> None:
    """Keys and values are two groups of copies a tile; no loop waits for all of its copies."""
    assert min(forward_waits(target, ordered)) >= 2


@pytest.mark.full
def test_too_few_stages_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    table = configs.FORWARD["sm_90"]
    monkeypatch.setitem(table, 64, replace(table[64], num_stages=2))
    assert min(forward_waits("sm_90", True)) == 0


# Loops whose rows are not fetched two tiles ahead, and why.
NOT_AHEAD = dict.fromkeys(
    [("bwd_q", "sm_80", "tf32", 256), ("bwd_kv", "sm_80", "tf32", 256)],
    "99 KB do not hold both orders of so many numbers",
)
LOOPING = ("fwd", "bwd_q", "bwd_kv")


def test_every_precision_has_the_stages_to_fetch_two_tiles_ahead() -> None:
    """But on AMD's; a row at once has no loop, and specialised warps have buffers of their own."""
    behind = {
        (*kind, largest)
        for kind, rows in kernel_calls.tables().items()
        for largest, config in rows.items()
        if kind[0] in LOOPING and kind[1] != "gfx942" and config.num_stages <= kernel_table.AHEAD
    }
    assert behind == NOT_AHEAD.keys()


def test_copies_of_every_precision_run_ahead() -> None:
    """In every loop over tiles of the committed table; one that waits for all is a fault."""
    seen = set()
    for row in COMMITTED:
        kernel = row["kernel"].removeprefix("layout_attention_").removesuffix("_kernel")
        if kernel not in LOOPING or "bodies" not in row or row["stages"] <= kernel_table.AHEAD:
            continue
        copying = row["bodies"] if kernel == "fwd" else row["bodies"][:1]
        assert all(min(body["copy_waits"]) >= kernel_table.AHEAD for body in copying), row
        slow = [body | {"copy_waits": [0]} for body in row["bodies"]]
        assert kernel_table.faults(row | {"bodies": slow}) != []
        seen.add((row["target"], kernel_calls.precision_of(row["dtype"], row["tf32"]), kernel))
    assert len(seen) == len(model.MODELLED) * len(("half", "tf32", "ieee")) * len(LOOPING)


@pytest.mark.parametrize("head_dim", [pytest.param(64, marks=pytest.mark.full), 128])
def test_groups_of_warps_part(head_dim: int) -> None:
    """One fetches tiles of keys, in as many buffers as there are stages, and two weigh them; loops
    over whole tiles leave hardly anything in local memory.
    """
    with ahead_of_time.compiled("sm_90") as launches:
        kernel_calls.Attention("sm_90", "fwd", head_dim)()
    packed, launch = launches
    assert (packed.kernel, launch.warps) == ("packed_rows_kernel", 12)
    loops = model.function_of(launch).inner_loops
    names = [{instruction.name for instruction in loop} for loop in loops]
    weighing = [found for found in names if "HGMMA" in found]
    assert len(weighing) == 2 * 2
    assert sum("UTMALDG" in found for found in names) >= 2
    assert not any("LDGSTS" in found for found in names)
    for loop in [x for x, found in zip(loops, names) if "HGMMA" in found][::2]:  # whole tiles
        local = sum(instruction.name in ("STL", "LDL") for instruction in loop)
        assert local <= (4 if head_dim <= 64 else 0)


def test_wide_heads_issue_no_more_than_plain_attention() -> None:
    call = kernel_calls.Attention("sm_90", "fwd", 128)
    rows = [row for row in kernel_table.compile_call(call, True) if "plain" in row]
    found = {bar["what"]: bar for bar in bars.bars(rows)}
    assert {bar["verdict"] for bar in found.values()} == {"holds"}
    assert found["untested tile"]["bound"] == 1.0


@pytest.mark.parametrize("head_dim", [64, pytest.param(128, marks=pytest.mark.full)])
def test_keys_may_end_within_a_tile_of_groups_of_warps(head_dim: int) -> None:
    """No round looks for the end, so that the bars hold as where tiles are whole."""
    call = kernel_calls.Attention("sm_90", "fwd", head_dim)
    ends = replace(call, seqlen=call.seqlen + 4)
    rows = [row | call.facts for row in kernel_table.compile_call(ends, True) if "plain" in row]
    found = {bar["what"]: bar for bar in bars.bars(rows)}
    assert {bar["verdict"] for bar in found.values()} == {"holds"}
    assert found["mixed tile"]["bound"] == bars.MIXED


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


def test_groups_of_warps_keep_their_rows() -> None:
    """Tried beside the table: tiles of twice or half as many keys, and fewer stages."""
    for config in configs.SPECIALISED["sm_90"].values():
        around = autotune.neighbours(config)
        assert around[0] == config
        tiles = [(x.BLOCK_N, x.num_stages) for x in around]
        narrow, wide = [(128, 4), (64, 4), (128, 3), (128, 2)], [(64, 3), (128, 2), (64, 2)]
        assert tiles in (narrow, wide)
        assert {(x.BLOCK_M, x.num_warps, x.specialised) for x in around} == {(128, 4, True)}


def test_tokens_that_no_tensor_map_can_hold_are_refused() -> None:
    """Places in a map are int32; nothing is made or launched first."""
    q, k = (
        torch.empty(512, 8, tokens, 64, device="meta", dtype=torch.bfloat16)
        for tokens in (4096, 1 << 19)
    )
    words = torch.empty(1 << 19, device="meta", dtype=torch.int32)
    call = (words[:4096], words, None, "range", 0.1)
    with ahead_of_time.compiled("sm_90") as launches:
        fewer, rest = k[:, :, 129:], (words[:4096], words[129:], *call[2:])
        plan = layout_attention.plan_fwd(q, fewer, fewer, *rest, *[None] * 5)
        assert plan.specialised.pack_sizes == (8, 4096, (1 << 19) - 129, (1 << 19) - 128)
        with pytest.raises(ValueError, match=r"k must have fewer than 2\*\*31 tokens.*, got 2147"):
            layout_attention.layout_attention_fwd(q, k, k, *call)
    assert launches == []


class Recorder:
    """A kernel whose launches are their grids alone."""

    def __init__(self, grids: list[tuple]) -> None:
        self._grids = grids

    def __getitem__(self, grid: tuple) -> Callable:
        return lambda *_, **__: self._grids.append(grid)


def test_long_rows_keep_to_the_first_axis_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others hold 65,535 programs."""
    grids = []
    monkeypatch.setattr(selection, "long_thresholds", lambda *_, **__: None)
    for kernel in ("mask_kernel", "sega_combine_kernel"):
        monkeypatch.setattr(sega, kernel, Recorder(grids))
    x = torch.empty(1, 2**27, device="meta")
    sega.percentile_mask(x, 0.9)
    each = {"edit_guidance_scale": [5.0], "edit_threshold": [0.9], "weights": [1.0]}
    each |= {"partials": [0.0], "all_warm": True, "reverse": [False]}
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.1, "edit_mom_beta": 0.4}
    eps = x[None]
    sega.sega_guidance(eps, eps, eps[None], eps, **each, **numbers)
    assert len(grids) == 2
    assert all(len(grid) == 1 and grid[0] >= 2**27 // sega.TILE for grid in grids)


def test_the_machine_code_has_the_waits_and_products_of_the_ptx() -> None:
    """In the loop of plain attention, whose copies run ahead."""
    q = torch.empty(1, 1, 64, 64, device="meta", dtype=torch.float16)
    with ahead_of_time.compiled("sm_90") as launches:
        plain_attention.attention_fwd(q, q, q, 1.0, plain_attention.Tile(64, 32, 4, 3))
    (launch,) = launches
    (loop,) = model.function_of(launch).inner_loops
    (ptx,) = re.finditer(r"(?ms)^(\$L__BB0_\d+):.*?\bbra\s+\1;", launch.assembly)
    waits = [
        [int(found) for found in re.findall(rf"{kind}\.wait_group\D*(\d+);", ptx.group())]
        for kind in ("cp.async", "wgmma")
    ]
    assert list(counts.waits(loop)) == waits == [[2], [0]]
    shapes = Counter(re.findall(r"wgmma.mma_async.sync.aligned.m(\w+)\.", ptx.group()))
    found = Counter()
    for opcode, count in counts.tensor(loop).items():
        found[re.sub(r"HGMMA\.(\d+)x(\d+)x(\d+)\..*", r"\1n\2k\3", opcode)] += count
    assert found == shapes == {"64n32k16": 4, "64n64k16": 2}


@pytest.mark.full  # a process of its own compiles
def test_a_call_that_does_not_compile_costs_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, and the table has the rest."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # two calls of one process
    calls = [kernel_calls.Other("sm_90", what) for what in ("no such kernel", "tile_lists")]
    rows, failed = kernel_table.compile_rows(calls)
    assert {row["kernel"] for row in rows} >= {"tile_lists_kernel"}
    (reason,) = failed
    assert reason.startswith(f"{calls[0]} does not compile by Triton 3.")


def test_what_has_spilled_within_a_round_is_seen() -> None:
    tiled = (row for row in COMMITTED if row["kernel"] in kernel_table.TILED_FORWARD)
    row = next(row for row in tiled if row.get("loops"))
    body = row["bodies"][0] | {"instructions": 320}
    for local, seen in ((10, False), (11, True)):
        other = [body | {"kinds": {"local": local}}, *row["bodies"][1:]]
        found = kernel_table.faults(row | {"bodies": other})
        assert any("of 320 instructions of a round" in fault for fault in found) == seen


def test_missing_matrix_instructions_are_seen() -> None:
    for target, kind in kernel_table.MATRIX.items():
        row = next(row for row in COMMITTED if row["target"] == target and kind in row["matrix"])
        assert kernel_table.faults(row | {"matrix": {"mma.other": 4}}) == [f"no {kind}"]
