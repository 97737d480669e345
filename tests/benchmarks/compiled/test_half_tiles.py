"""Half tiles, where whole ones would leave processors idle: which calls take them, and that lists,
grids and plans follow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from cases import CASES, HALVED

pytest.importorskip("triton")

from dense_attn.benchmarks.compiled import ahead_of_time, kernel_calls
from dense_attn.triton_kernels import configs, layout_attention
from dense_attn.triton_kernels.layout_attention.records import STATS


def test_few_tiles_are_halved_so_that_processors_are_busy() -> None:
    """Each half has a processor of its own then; a target's are those of its device."""
    whole = configs.Config(128, 64, 8, 3)
    half = replace(whole, BLOCK_M=64, num_warps=4)
    for heads, processors, expected in ((16, 132, half), (33, 132, half), (34, 132, whole)):
        assert configs.filling(whole, 256, heads, processors) == expected
    assert configs.filling(whole, 257, 27, 132) == whole  # five halves a head
    assert configs.filling(half, 256, 1, 132) == half
    assert configs.processors(torch.device("cpu")) == 1
    for heads in (8, 64):
        q = torch.empty(2, heads, 256, 64, device="meta", dtype=torch.bfloat16)
        with ahead_of_time.compiled("sm_90"):
            assert layout_attention.fwd_blocks(q, q)[0] == (64 if heads == 8 else 128)


def test_the_pass_over_keys_halves_its_keys() -> None:
    """Keys of a prompt are one tile a head; four warps are not parted, one a partition."""
    whole = configs.Config(64, 128, 8, 3)
    half = replace(whole, BLOCK_N=64, num_warps=4)
    for heads, processors, expected in ((16, 132, half), (66, 132, half), (67, 132, whole)):
        assert configs.filling(whole, 77, heads, processors, "BLOCK_N") == expected
    assert configs.filling(half, 77, 1, 132, "BLOCK_N") == half
    for config in (replace(whole, num_warps=4), configs.BACKWARD_KV["sm_80"][128]):
        assert configs.filling(config, 77, 1, 132, "BLOCK_N") == config
    for rows, heads, sides in ((4096, 8, (128, 64)), (256, 8, (64, 64)), (256, 99, (128, 128))):
        q, k = (
            torch.empty(1, heads, tokens, 128, device="meta", dtype=torch.bfloat16)
            for tokens in (rows, 77)
        )
        with ahead_of_time.compiled("sm_90"):
            by_query, by_key = layout_attention.bwd_config(q, k)
        assert sides == (by_query.BLOCK_M, by_key.BLOCK_N)


def test_few_tiles_of_keys_share_their_queries() -> None:
    """Each program finds a processor and has eight rounds left, where 32 are saved."""
    half = configs.Config(64, 64, 4, 3)
    for queries, keys, heads, processors, splits in (
        *((4096, 77, 16, 132, 4), (4096, 77, 20, 132, 2), (4096, 77, 16, 108, 2)),
        *((4096, 77, 33, 132, 2), (4096, 77, 34, 132, 1), (4096, 64, 34, 132, 2)),
        *((4096, 77, 1, 132, 8), (4095, 77, 1, 132, 8), (65536, 77, 1, 132, 64)),
        *((4032, 77, 1, 132, 4), (3968, 77, 20, 132, 1), (2688, 77, 16, 132, 1)),
        *((2752, 77, 16, 132, 4), (1024, 77, 1, 132, 1), (4096, 77, 1, 1, 1)),
    ):
        found = configs.splitting(half, queries, keys, heads, processors)
        assert found == replace(half, splits=splits)
    assert "SPLITS" not in half.launch
    assert replace(half, splits=4).launch == {"SPLITS": 4, **half.launch}


@pytest.mark.parametrize(("heads", "key_heads"), [(8, 8), (8, 2)])
def test_plans_have_room_for_each_share(heads: int, key_heads: int) -> None:
    """It is beside that of each head of queries, so that one sum is of all."""
    q, k = (
        torch.empty(2, of, tokens, 40, device="meta", dtype=torch.bfloat16)
        for of, tokens in ((heads, 4096), (key_heads, 77))
    )
    words = [q.new_empty(x.shape[2], dtype=torch.int32) for x in (q, k)]
    stats = q.new_empty(2, heads, 4096, STATS, dtype=torch.float32)
    with ahead_of_time.compiled("sm_90"):
        given = (q, None, q, k, k, *words, None, q, stats, "range", 0.1, None, None)
        plan = layout_attention.plan_bwd(*given)
    assert plan.configs[1].splits == 4
    assert plan.grids[1] == (2 * heads * 2, 4)
    assert plan.apart[0] == (2, 2, 4 * heads, 77, 40)
    assert plan.options[1]["SPLITS"] == 4
    assert "SPLITS" not in plan.options[0]


def noting(grids: list[tuple]) -> object:
    """A kernel whose launches are their grids alone."""

    class Kernel:
        def __getitem__(self, grid: tuple) -> Callable:
            return lambda *_, **__: grids.append(grid)

    return Kernel()


def test_lists_and_grids_of_gradients_are_of_half_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a mask each pass has lists of its own tiles, whose size is the plan's."""
    q = torch.empty(1, 2, 256, 128, device="meta", dtype=torch.bfloat16)
    words, numbers = (q.new_empty(256, dtype=torch.int32), q.new_empty(1, 2, 256).float())
    stats, blocks, grids = numbers.new_empty(1, 2, 256, STATS), [], []
    made = layout_attention.tile_lists

    def noted(*given: object) -> object:
        blocks.append(given[4:6])
        return made(*given)

    monkeypatch.setattr(layout_attention, "tile_lists", noted)
    for way in ("q", "kv"):
        kernel = f"layout_attention_bwd_{way}_kernel"
        monkeypatch.setattr(layout_attention, kernel, noting(grids))
    with ahead_of_time.compiled("sm_90"):
        given = (q, None, q, q, q, words, words, numbers, q, stats, "mask", 0.1)
        layout_attention.layout_attention_bwd(*given)
    assert blocks == [(64, 32), (64, 32)]
    assert grids == [(8,), (8,)]


@pytest.mark.parametrize("head_dim", [40, 128])
def test_few_rows_of_many_keys_take_ordinary_half_tiles(head_dim: int) -> None:
    """Where specialised warps would leave processors idle: nothing is packed."""
    for heads, few in ((8, True), (9, False)):
        q = torch.empty(1, heads, 1024, head_dim, device="meta", dtype=torch.bfloat16)
        call = (q, q, q, *[q.new_empty(1024, dtype=torch.int32)] * 2, None, "range", 0.1)
        with ahead_of_time.compiled("sm_90"):
            plan = layout_attention.plan_fwd(*call, *[None] * 5)
            assert layout_attention.fwd_blocks(q, q) == (plan.config.BLOCK_M, plan.config.BLOCK_N)
        assert (plan.specialised is None) == few
        if few:
            ordinary = configs.FORWARD["sm_90"][64 if head_dim == 40 else 128]
            assert plan.config == configs.filling(ordinary, 1024, heads, 132) != ordinary
            assert plan.grid == (8 * 1024 // 64,)


def test_every_half_tile_is_compiled() -> None:
    """But on gfx942, whose four warps are 256 threads."""
    calls = kernel_calls.everything()
    few = {(x.target, x.which, x.precision, x.head_dim) for x in calls if is_few(x)}
    found = {
        (target, kernel.removesuffix("_q").removesuffix("_kv"), precision, d)
        for (kernel, target, precision), rows in kernel_calls.tables().items()
        for d, config in rows.items()
        if not config.specialised and kernel_calls.half_of(kernel, config) != config
    }
    assert few == found
    assert {(target, which) for target, which, *_ in found} == {
        (target, which) for target in ("sm_80", "sm_90", "sm_100") for which in ("fwd", "bwd")
    } | {("sm_90", "row_fwd")}


def is_few(call: kernel_calls.Attention | kernel_calls.Other) -> bool:
    return getattr(call, "seqlen", None) == kernel_calls.FEW


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_every_row_with_half_tiles_is_emulated(target: str) -> None:
    """Half tiles of half floats are emulated: by a case of several tiles, forward and backward."""
    sizes = [case.size for case in CASES if case.name in HALVED]
    assert len(sizes) == len(HALVED)
    for kernel in ("fwd", "bwd_q", "bwd_kv"):
        rows = kernel_calls.tables()[kernel, target, "half"]
        halved = {d: x for d, x in rows.items() if kernel_calls.half_of(kernel, x) != x}
        reached = {
            next(largest for largest in rows if size[4] <= largest)
            for size in sizes
            if size[3] > 128  # two tiles of keys
        }
        assert halved
        assert halved.keys() <= reached
    others = kernel_calls.tables()["bwd_kv", target, "ieee"]
    assert all(kernel_calls.half_of("bwd_kv", config) == config for config in others.values())


def test_every_specialised_configuration_has_an_ordinary_one() -> None:
    """It is of the same columns."""
    for target, rows in configs.SPECIALISED.items():
        for head_dim, config in rows.items():
            half = configs.filling(config, 1, 1, 2)
            assert half == configs.filling(configs.FORWARD[target][head_dim], 1, 1, 2)
            assert not half.specialised
            assert half.BLOCK_M == config.BLOCK_M // 2
