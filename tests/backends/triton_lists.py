# ruff: noqa: ANN001, ANN201  # jit functions
"""Tile lists, orders and turns of layout attention's Triton kernels: on a GPU or interpreted."""

from __future__ import annotations

import pytest
import torch
import triton.language as tl
from cases import CASES, DEVICES, INTERPRETED, Case, Inputs, moved
from cases import make_inputs as make_on_the_cpu
from triton import jit

from dense_attn import layout_attention, tile_lists
from dense_attn._backends import triton
from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels import layout_attention as launchers
from dense_attn.triton_kernels.primitives import tile_in_turn

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
DEVICE = DEVICES["triton"]
CASE = {case.name: case for case in CASES}
NO_LISTS = (None, None, None)


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    return moved(make_on_the_cpu(case, dtype), DEVICE)


@pytest.mark.parametrize(
    "case", ["ordered-in-runs", "ordered-per-sample", "words-of-one-sample", "bit-31"]
)
def test_tile_lists(case: str) -> None:
    """Every pair of tiles is in the list that its pairs of tokens ask for, once."""
    inputs = make_inputs(CASE[case], torch.float32)
    orders = inputs.orders.get("q_order"), inputs.orders.get("k_order")
    tiles, counts, _ = launchers.tile_lists(inputs.q_regions, inputs.k_regions, *orders, 16, 16)
    q_words, k_words = (
        words if order is None else words.gather(-1, order.long())
        for words, order in zip((inputs.q_regions, inputs.k_regions), orders)
    )
    q_words, k_words = (
        q_words.reshape(-1, q_words.shape[-1]),
        k_words.reshape(-1, k_words.shape[-1]),
    )
    assert len(tiles) == len(q_words)
    found = set()
    for b, i in ((b, i) for b in range(len(tiles)) for i in range(tiles.shape[1])):
        (matched, mixed, unmatched), last = counts[b, i].tolist(), tiles.shape[3]
        kinds = tiles[b, i, 0, :matched], tiles[b, i, 1, :mixed], tiles[b, i, 0, last - unmatched :]
        assert sorted(torch.cat(kinds).tolist()) == list(range(last))
        for kind, listed in enumerate(kinds):
            for j in listed.tolist():
                pairs = (
                    q_words[b, 16 * i : 16 * i + 16, None] & k_words[b, None, 16 * j : 16 * j + 16]
                )
                whole = 16 * j + 16 <= k_words.shape[1]
                assert kind == 1 or (whole and ((pairs != 0).all(), None, (pairs == 0).all())[kind])
                assert (
                    kind != 1 or not whole or (pairs != 0).any()
                )  # a tile without a match is never in doubt
                found.add(kind)
    assert found == ({0, 1, 2} if case == "ordered-in-runs" else found)


# Cases for whole tiles of compiled kernels: the kinds of tile that they meet in each sample.
MATCHED, MIXED, UNMATCHED = range(3)
WHOLE_TILES = {
    "low-unmatched": [{UNMATCHED}],
    "strengths-in-whole-tiles": [{MATCHED, MIXED, UNMATCHED}, {MIXED, UNMATCHED}, {MATCHED}],
    "no-numbers-in-whole-tiles": [{MATCHED, MIXED, UNMATCHED}],
}


@pytest.mark.skipif(not INTERPRETED, reason="of GPUs that are not here")
@pytest.mark.parametrize("packed_keys", [0, configs.PACKED_KEYS], ids=["specialised", "plain"])
@pytest.mark.parametrize("precision", ["half", "ieee"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("case", WHOLE_TILES)
def test_whole_tiles_of_each_kind(
    case: str, target: str, precision: str, packed_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles of compiled kernels; keys of no numbers are in one of the kind that they are for.

    The backward passes know whole tiles of keys and the one that they end in alone.
    """
    monkeypatch.setattr(configs, "PACKED_KEYS", packed_keys)
    inputs, (*_, seqlen_k, head_dim) = make_inputs(CASE[case], torch.float32), CASE[case].size
    words = inputs.q_regions, inputs.k_regions
    config = configs.layout_attention_fwd(target, precision, head_dim, seqlen_k)
    backward = configs.layout_attention_bwd(target, precision, head_dim)
    assert [seqlen_k % x.BLOCK_N for x in (config, *backward)] == [0] * 3
    orders = (triton._by_region(x) for x in words)
    lists = launchers.tile_lists(*words, *orders, config.BLOCK_M, config.BLOCK_N)
    kinds = torch.stack([kinds_of(*one) for one in zip(lists.tiles, lists.counts)])
    assert [x - set(of.flatten().tolist()) for x, of in zip(WHOLE_TILES[case], kinds)] == [
        set()
    ] * len(kinds)
    _, _, keys, _ = torch.where(~inputs.k.isfinite())
    if len(keys):
        assert kinds[0, 0, keys // config.BLOCK_N].tolist() == [MATCHED, MIXED, UNMATCHED] * 2


def kinds_of(tiles: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """The kind of each key tile of each tile of query rows [query tiles, key tiles]."""
    kinds = torch.full_like(tiles[:, 0], -1)
    for row, listed, (matched, mixed, unmatched) in zip(kinds, tiles, counts.tolist()):
        row[listed[0, :matched].long()] = MATCHED
        row[listed[1, :mixed].long()] = MIXED
        row[listed[0, len(row) - unmatched :].long()] = UNMATCHED
    return kinds


def test_lists_are_of_the_keys_that_are_there() -> None:
    """A tile of others is in none, the one that they begin in is in doubt."""
    inputs = make_inputs(CASE["keys-anywhere-in-runs"], torch.float32)
    counts_of = torch.tensor([33, 0], dtype=torch.int32, device=DEVICE)
    words = inputs.q_regions, inputs.k_regions
    tiles, counts, _ = launchers.tile_lists(*words, None, None, 16, 16, counts_of)
    short = launchers.tile_lists(words[0], words[1][:33], None, None, 16, 16)
    assert counts[1].tolist() == [[0, 0, 0]] * tiles.shape[1]
    assert torch.equal(counts[0], short.counts[0])
    for i, (matched, mixed, unmatched) in enumerate(counts[0].tolist()):
        assert mixed > 0
        assert torch.equal(tiles[0, i, 0, :matched], short.tiles[0, i, 0, :matched])
        assert torch.equal(tiles[0, i, 1, :mixed], short.tiles[0, i, 1, :mixed])
        ends = tiles.shape[3] - unmatched, short.tiles.shape[3] - unmatched
        assert torch.equal(tiles[0, i, 0, ends[0] :], short.tiles[0, i, 0, ends[1] :])


@pytest.mark.parametrize("case", ["keys-anywhere-in-runs", "keys-counted-in-runs"])
def test_lists_of_a_mask_made_beforehand(case: str) -> None:
    """They change nothing, and no number of a key that is not there does."""
    inputs = make_inputs(CASE[case], torch.float32)
    tensors = inputs.q, inputs.k, inputs.v, inputs.q_regions, inputs.k_regions
    options = {"k_mask": inputs.k_mask, "backend": "triton"}
    expected = layout_attention(*tensors, 0.7, **options, return_lse=True)
    lists = tile_lists(*tensors[:2], *tensors[3:], **options)
    there = inputs.k_mask
    if there.dtype == torch.int32:
        there = torch.arange(inputs.k.shape[2], device=DEVICE) < there[:, None]
    for x in tensors[1:3]:
        x[~there[:, None].expand(x.shape[:3])] = torch.nan
    got = layout_attention(*tensors, 0.7, **options, return_lse=True, tile_lists=lists)
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


def test_lists_made_beforehand() -> None:
    inputs = make_inputs(CASE["ordered-in-runs"], torch.float32)
    q, k, strength = inputs.q, inputs.k, inputs.strength.expand(inputs.q.shape[:3])
    arguments = (q, k, inputs.v, inputs.q_regions, inputs.k_regions, strength, "range", 0.2)
    orders = tuple(inputs.orders.values())
    words = inputs.q_regions, inputs.k_regions
    *lists, q_order, k_order = triton.tile_lists_for(q, k, *words, *orders, kept=True)
    assert (q_order, k_order) == orders  # the very tensors
    plain = triton.layout_attention_fwd(*arguments, *orders, *NO_LISTS)
    for a, b in zip(plain, triton.layout_attention_fwd(*arguments, *orders, *lists)):
        assert torch.equal(a, b)
    with pytest.raises(RuntimeError, match="tile_lists must be 3 tensors, got 2"):
        triton.layout_attention_fwd(*arguments, *orders, *lists[:2], None)
    with pytest.raises(RuntimeError, match="tile_lists must have contiguous tensors of shape"):
        triton.layout_attention_fwd(*arguments, *orders, lists[0][:, 1:], *lists[1:])


def test_lists_of_another_length_are_refused() -> None:
    """Whole tiles are read without a look at where the keys end, also of as many tiles."""
    q, k = torch.randn(1, 1, 20, 16, device=DEVICE), torch.randn(1, 1, 160, 16, device=DEVICE)
    words, strength = (
        torch.ones(160, dtype=torch.int32, device=DEVICE),
        torch.ones(1, 1, 20, device=DEVICE),
    )
    *lists, _, _ = triton.tile_lists_for(q, k, words[:20], words, False, False, kept=True)
    block = triton.layout_attention.fwd_blocks(q, k)[1]
    fewer = 160 - block + 1
    short = (
        q,
        k[:, :, :fewer],
        k[:, :, :fewer],
        words[:20],
        words[:fewer],
        strength,
        "range",
        0.2,
        None,
        None,
    )
    with pytest.raises(
        RuntimeError, match=rf"tile_lists must have contiguous tensors of shape \[1 or B, {fewer}\]"
    ):
        triton.layout_attention_fwd(*short, *lists)


def in_tiles(case: str) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """q, k, v and both words of a case, and its strengths."""
    inputs = make_inputs(CASE[case], torch.float32)
    tensors = inputs.q, inputs.k, inputs.v, inputs.q_regions, inputs.k_regions
    return tensors, inputs.strength


@pytest.mark.parametrize(
    "case", ["ordered-in-runs", "words-of-one-sample", "bit-31", "ordered-per-sample"]
)
def test_tokens_are_sorted_where_no_order_is_given(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed words in ascending order, raster order within a word; False leaves tokens alone."""
    given = []
    op = "layout_attention_fwd"
    launch = triton.EAGER[op]
    monkeypatch.setattr(configs, "ROW_KEYS", 0)
    monkeypatch.setitem(triton.EAGER, op, lambda *x: (given.append(x[8:10]), launch(*x))[1])
    tensors, strength = in_tiles(case)
    lists = tile_lists(*tensors[:2], *tensors[3:], backend="triton")
    raster = {"q_order": False, "k_order": False}
    results = [
        layout_attention(*tensors, strength, backend="triton", **how)
        for how in ({}, {"tile_lists": lists}, raster)
    ]
    assert torch.equal(results[0], results[1])  # the same tiles of rows in another turn
    torch.testing.assert_close(results[0], results[2])
    for words, order, kept in zip(tensors[3:], *given[:2], strict=True):
        assert order.dtype == kept.dtype == torch.int32
        expected = words.cpu().numpy().argsort(axis=-1, kind="stable")
        assert order.tolist() == expected.tolist()
        tokens = torch.arange(words.shape[-1], dtype=torch.int32, device=DEVICE)
        assert torch.equal(kept.sort(-1).values, tokens.expand_as(kept))
    assert given[2] == (None, None)


@pytest.mark.parametrize("modulation", ["range", pytest.param("mask", marks=pytest.mark.full)])
@pytest.mark.parametrize("row_keys", [0, configs.ROW_KEYS], ids=["tiles", "row"])
def test_a_number_is_the_strength_of_every_row(
    modulation: str, row_keys: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without what a gradient needs, the same bits."""
    monkeypatch.setattr(configs, "ROW_KEYS", row_keys)
    tensors, _ = in_tiles("ordered-in-runs")
    rows = slice(96 if INTERPRETED else None)  # two tiles
    sides = (rows, slice(row_keys or None), slice(row_keys or None))
    tensors = [
        *(x[:, :, side] for x, side in zip(tensors, sides)),
        *(words[side] for words, side in zip(tensors[3:], sides)),
    ]
    leaves = [x.requires_grad_() for x in tensors[:3]]
    how = {"modulation": modulation, "backend": "triton"}
    results = []
    for strength in (0.3, torch.full((len(tensors[3]),), 0.3, device=DEVICE)):
        out = layout_attention(*tensors, strength, **how)
        results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        with torch.no_grad():
            assert torch.equal(layout_attention(*tensors, strength, **how), out)
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@jit
def turns_kernel(turns, num_heads, seqlen_q, seqlen_k, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """The head among all samples', tile, sample and head of every program."""
    at = turns + 4 * tl.program_id(0)
    index, tile, batch, head = tile_in_turn(num_heads, seqlen_q, seqlen_k, WIDTH, BLOCK)
    tl.store(at, index)
    tl.store(at + 1, tile)
    tl.store(at + 2, batch)
    tl.store(at + 3, head)


@pytest.mark.parametrize(
    ("heads", "sizes", "group"),
    [
        ((2, 8), (256, 4096, 80), 16),
        ((1, 24), (300, 4608, 256), 12),  # 14 would fit: two groups alike
        ((1, 5), (129, 10**6, 512), 1),
        ((1, 7), (300, 300_000, 16), 3),  # 3, 3, 1
        ((3, 1), (1, 1, 2), 3),
    ],
)
def test_heads_take_turns_with_their_tiles(
    heads: tuple[int, int], sizes: tuple[int, int, int], group: int
) -> None:
    """Each tile of each head once, as many heads at a time as have room in a cache."""
    tiles, num_heads = -(-sizes[0] // 128), heads[0] * heads[1]
    turns = torch.full((num_heads * tiles, 4), -1, dtype=torch.int32, device=DEVICE)
    turns_kernel[(num_heads * tiles,)](turns, heads[1], *sizes, 128)
    expected = [
        [index, tile, *divmod(index, heads[1])]
        for first in range(0, num_heads, group)
        for tile in range(tiles)
        for index in range(first, min(first + group, num_heads))
    ]
    assert turns.tolist() == expected


def test_kept_lists_begin_with_the_tiles_that_take_longest() -> None:
    """And end with the tile that the queries end in; each is what it is without."""
    (q, k, _, *words), _ = in_tiles("ordered-in-runs")
    blocks = triton.layout_attention.fwd_blocks(q, k)
    tiles, counts, _, q_order, k_order = tile_lists(q, k, *words, backend="triton")
    *_, by_region, _ = triton.tile_lists_for(q, k, *words, None, None, kept=False)
    work = counts[:, :-1, 0] + triton._MIXED * counts[:, :-1, 1]
    assert work.shape[1] > 1
    assert (work.diff(dim=1) <= 0).all()
    assert (work.diff(dim=1) < 0).any()
    last = q.shape[2] % blocks[0]
    assert last > 0
    assert torch.equal(q_order[..., -last:], by_region[..., -last:])
    assert not torch.equal(q_order, by_region.expand_as(q_order))
    made = launchers.tile_lists(*words, q_order, k_order, *blocks)
    assert torch.equal(counts, made.counts)
    for ours, theirs, (matched, mixed, unmatched) in zip(
        tiles.flatten(0, 1), made.tiles.flatten(0, 1), counts.flatten(0, 1).tolist(), strict=True
    ):
        size = ours.shape[1]
        assert torch.equal(ours[0, :matched], theirs[0, :matched])
        assert torch.equal(ours[0, size - unmatched :], theirs[0, size - unmatched :])
        assert torch.equal(ours[1, :mixed], theirs[1, :mixed])


def test_tile_lists_inside_of_a_compiled_function() -> None:
    inputs = make_inputs(Case("compiled", (1, 1, 20, 150, 16)), torch.float32)
    tensors = inputs.q, inputs.k, inputs.v, inputs.q_regions, inputs.k_regions

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *words: torch.Tensor
    ) -> torch.Tensor:
        lists = tile_lists(q, k, *words, backend="triton")
        return layout_attention(q, k, v, *words, tile_lists=lists, backend="triton")

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors))
