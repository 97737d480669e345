# jit functions
"""Layout attention's Triton kernels beside accuracy: on a GPU (`make gpu`) or interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from accuracy import evaluate
from cases import CASES, DEVICES, INTERPRETED, Case, Inputs, moved
from cases import make_inputs as make_on_the_cpu

from dense_attn import layout_attention, reference, tile_lists
from dense_attn._backends import plans, triton
from dense_attn.triton_kernels import configs
from dense_attn.triton_kernels import layout_attention as launchers
from dense_attn.triton_kernels.layout_attention import arguments, fwd_specialised
from dense_attn.triton_kernels.layout_attention.records import LISTED

pytestmark = [pytest.mark.usefixtures("poisoned_memory")]
DEVICE = DEVICES["triton"]
CASE = {case.name: case for case in CASES}
NO_LISTS = (None, None, None)


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    return moved(make_on_the_cpu(case, dtype), DEVICE)


def use_tiles(monkeypatch: pytest.MonkeyPatch, specialised: bool) -> configs.Config:
    """The configuration of every call, however few its keys."""
    for name in ("ROW_KEYS", "PACKED_KEYS"):
        monkeypatch.setattr(configs, name, 0)
    config = replace(configs.INTERPRETED, specialised=specialised)
    monkeypatch.setattr(configs, "INTERPRETED", config)
    return config


def run(case: Case, modulation: str, inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> dict:
    """In two phases, by a plan of its own: configurations may be others than before."""
    plans.forget()
    monkeypatch.setattr(configs, "ROW_KEYS", 0)
    options = {
        "modulation": modulation,
        "scale": case.scale,
        "return_lse": True,
        "backend": "triton",
    }
    return evaluate(partial(layout_attention, **options, **inputs.orders), inputs, case.through)


@pytest.mark.skipif(
    not INTERPRETED, reason="a GPU's compiler may sum otherwise where registers are fewer"
)
def test_a_parked_state_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An accumulator that waits in memory gives the bits of one that waits in registers."""
    inputs = make_inputs(CASE["head-dim-80"], torch.float32)
    results = run(CASE["head-dim-80"], "range", inputs, monkeypatch)
    monkeypatch.setattr(configs, "INTERPRETED", replace(configs.INTERPRETED, parks=True))
    for name, parked in run(CASE["head-dim-80"], "range", inputs, monkeypatch).items():
        assert torch.equal(parked, results[name]), name


@pytest.mark.parametrize("modulation", ["range", pytest.param("mask", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("case", "splits"),
    [
        *(("groups-in-runs", 2), ("keys-counted", 2)),
        pytest.param("many-rows", 2, marks=pytest.mark.full),  # extremes looked through by parts
        *(("groups-of-some-keys", 4), ("one-query", 4)),  # fewer tiles than shares
    ],
)
def test_shares_of_queries_add_up(
    case: str, splits: int, modulation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several programs a tile of keys, of which some may have no query; the other gradients are the
    same bits, and so are all of another run.
    """
    inputs, found = make_inputs(CASE[case], torch.float32), []
    for count in (1, splits, splits):
        shared = partial(replace, splits=count)
        monkeypatch.setattr(configs, "splitting", lambda table, *_, shared=shared: shared(table))
        found.append(run(CASE[case], modulation, inputs, monkeypatch))
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], found[2][name]), name
        if name in ("dk", "dv"):
            assert torch.allclose(found[1][name], expected, rtol=1e-5, atol=2e-5), name
        else:
            assert torch.equal(found[1][name], expected), name


def test_shares_list_their_extremes_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that share a tile's queries run at once: none writes where another reads."""
    inputs, splits, seen = make_inputs(CASE["head-dim-80"], torch.float32), 3, []

    class Kept:
        """The kernel, whose lists are looked at behind a launch."""

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *given, **options: seen.append((kernel[grid](*given, **options), given))

    kernel = launchers.layout_attention_bwd_kv_kernel
    monkeypatch.setattr(launchers, "layout_attention_bwd_kv_kernel", Kept())
    monkeypatch.setattr(configs, "splitting", lambda table, *_: replace(table, splits=splits))
    run(CASE["head-dim-80"], "range", inputs, monkeypatch)
    ((_, given),) = seen
    places = given[8]
    listed = (
        places[:, :, LISTED.value :].flatten(2).cpu()
    )  # of rows' largest scores, and of smallest
    count = 2 * inputs.q.shape[2]
    for begin, end in pairwise(count * share // splits for share in range(splits + 1)):
        own = listed[..., begin:end].sort().values
        assert torch.equal(own, torch.arange(begin, end, dtype=torch.int32).expand_as(own))


def test_what_delta_has_missed_is_taken_back() -> None:
    """Exact float32 needs it: where a key weighs most, its slope's rounding must be in delta, which
    comes of `out`, as well. Here out is wrong by far more than that.
    """
    case = Case("missed", (1, 2, 70, 90, 40))
    inputs = make_inputs(case, torch.float32)
    strength = inputs.strength.expand(inputs.q.shape[:3])
    tensors = inputs.q, inputs.k, inputs.v, inputs.q_regions, inputs.k_regions, strength
    out, _, stats = launchers.layout_attention_fwd(*tensors, "range", 0.2)
    grad = torch.randn_like(out)
    expected, found = (
        launchers.layout_attention_bwd(grad, None, *tensors, x, stats, "range", 0.2)
        for x in (out, out + 0.01)
    )
    for name, x, y in zip(("dq", "dk", "dv", "dstrength"), expected, found):
        assert torch.allclose(x, y, atol=2e-5), name


@pytest.mark.skipif(not INTERPRETED, reason="the interpreter's tiles")
@pytest.mark.parametrize("way", ["loaded", "turned"])
def test_rows_in_two_orders_are_the_same(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32's, of which the compiler copies ahead what all products read in one order."""
    inputs = make_inputs(CASE["head-dim-80"], torch.float32)
    monkeypatch.setattr(configs, "precision", lambda q: "tf32")
    results = run(CASE["head-dim-80"], "range", inputs, monkeypatch)
    asked = []
    monkeypatch.setattr(arguments, "_ahead", lambda *given: (asked.append(given), way)[1])
    for name, found in run(CASE["head-dim-80"], "range", inputs, monkeypatch).items():
        assert torch.allclose(found, results[name], rtol=1e-5, atol=1e-6), name
        assert way == "turned" or torch.equal(found, results[name]), name
    assert len(asked) > 0


@pytest.mark.skipif(not INTERPRETED, reason="small tiles, of which a head has several")
@pytest.mark.parametrize("specialised", [False, True])
def test_tiles_without_strength_are_known(
    specialised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys are visited as they come, as one population; of their lists the tile that the keys end
    in is looked at alone.
    """
    use_tiles(monkeypatch, specialised)
    case = Case("half-without", (2, 2, 130, 70, 16), words="runs", ordered=True)
    inputs = make_inputs(case, torch.float32)
    strength = inputs.strength.expand(inputs.q.shape[:3]).clone()
    tokens = inputs.q_regions, inputs.k_regions
    orders = inputs.orders["q_order"], inputs.orders["k_order"]
    block = configs.INTERPRETED.BLOCK_M
    strength[0, 1, orders[0][..., block : 2 * block].long()] = 0
    strength[1] = 0
    strength[1, 0, orders[0][..., -1].long()] = 0.5
    lists = launchers.tile_lists(*tokens, *orders, block, configs.INTERPRETED.BLOCK_N)
    given = (inputs.q, inputs.k, inputs.v, *tokens, strength, "range", 0.25)
    got, _, _ = launchers.layout_attention_fwd(*given, *orders, *lists)
    expected = reference.layout_attention(*given[:6], modulation="range", scale=0.25)
    assert torch.allclose(got, expected[0], atol=2e-6)
    lists.counts.zero_()  # nothing is to be visited now but the tile that the keys end in
    lists.counts[..., 1], lists.tiles[..., 1, 0] = 1, lists.tiles.shape[3] - 1
    blind, _, _ = launchers.layout_attention_fwd(*given, *orders, *lists)
    alike = (blind == got).all(-1)
    some = strength.gather(2, orders[0].long().expand(2, 2, -1)) != 0
    tiles = [part.any(-1, keepdim=True).expand(part.shape) for part in some.split(block, 2)]
    places = orders[0].long().expand(2, 2, -1)
    plain = torch.ones_like(some).scatter(2, places, ~torch.cat(tiles, 2))
    assert torch.equal(alike, plain)


@pytest.mark.skipif(not INTERPRETED, reason="small tiles, and float32")
def test_keys_are_packed_where_no_map_can_be_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a tensor begins is no part of a call's form: one plan serves both."""
    use_tiles(monkeypatch, specialised=True)
    inputs = make_inputs(Case("whole-tiles", (1, 2, 70, 64, 16), words="runs"), torch.float32)
    rest = (inputs.q_regions, inputs.k_regions, inputs.strength.expand(1, 2, 70))
    rest += ("range", 0.25, None, None, *NO_LISTS)
    launched, kind = [], type(fwd_specialised.packed_rows_kernel)

    def noted(kernel: object, *given: object, **named: object) -> None:
        launched.append(kernel.__name__)
        run_kernel(kernel, *given, **named)

    run_kernel = kind.run
    monkeypatch.setattr(kind, "run", noted)
    expected = triton.layout_attention_fwd(inputs.q, inputs.k, inputs.v, *rest)
    assert "packed_rows_kernel" not in launched
    for name in ("k", "v"):
        tensors = {"k": inputs.k, "v": inputs.v}
        like = tensors[name]
        tensors[name] = like.new_empty(like.numel() + 1)[1:].view(like.shape).copy_(like)
        launched.clear()
        got = triton.layout_attention_fwd(inputs.q, *tensors.values(), *rest)
        assert "packed_rows_kernel" in launched
        for a, b in zip(got, expected):
            assert torch.equal(a, b), name


@pytest.mark.skipif(not INTERPRETED, reason="small tiles")
def test_lists_of_other_counts_lead_to_no_other_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without strength go straight to the tile that the keys end in, if it is listed."""
    tile = use_tiles(monkeypatch, specialised=True)
    inputs = make_inputs(Case("counted", (1, 1, 16, 64, 16), words="runs"), torch.float16)
    words = torch.ones_like(inputs.q_regions), torch.ones_like(inputs.k_regions)
    fewer, more = (torch.tensor([n], dtype=torch.int32) for n in (tile.BLOCK_N, tile.BLOCK_N + 8))
    lists = tile_lists(inputs.q, inputs.k, *words, k_mask=fewer, backend="triton")
    lists[0][0, 0, 0, 1] = 10**6  # behind those that are listed
    q, k, v = inputs.q, inputs.k, inputs.v
    inputs = q, k, v, *words, torch.zeros((), dtype=torch.float32, device=DEVICE)
    got = layout_attention(*inputs, k_mask=more, tile_lists=lists, backend="triton")
    k, v = (x[:, :, : tile.BLOCK_N].float() for x in (k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q.float(), k, v)
    assert torch.allclose(got.float(), expected, atol=2e-3)


def test_rows_far_apart_are_found_by_64_bits() -> None:
    """Strides of 2**31 and more are no factor of a product of 32 bits."""
    for stride, grain in ((2**31 - configs.GRAIN, configs.GRAIN), (2**31, 1)):
        *_, rows, grains = arguments._grains((1, 1, 3, 64), (0, 0, stride, 1))
        assert (rows, grains.value) == (stride // grain, grain)


def row_call(seqlen_k: int, modulation: str) -> tuple[object, ...]:
    """The arguments of a launch whose rows of scores are one tile."""
    case = Case(f"row-of-{seqlen_k}", (1, 1, 20, seqlen_k, 40))
    inputs = make_inputs(case, torch.float32)
    strength = inputs.strength.expand(inputs.q.shape[:3])
    tensors = inputs.q, inputs.k, inputs.v, inputs.q_regions, inputs.k_regions, strength
    return *tensors, modulation, 0.2


@pytest.mark.parametrize("modulation", ["range", "mask"])
@pytest.mark.parametrize("seqlen_k", [1, 16, 17, 64, 65, 80, 81, 96, 97, 128])
def test_rows_of_any_number_of_keys(seqlen_k: int, modulation: str) -> None:
    """Every size of the tile, full and with one key more than the one before it."""
    call = row_call(seqlen_k, modulation)
    expected = reference.layout_attention(*call[:6], modulation=modulation, scale=0.2)
    got = launchers.layout_attention_fwd(*call)
    assert all(torch.allclose(a, b, atol=2e-6) for a, b in zip(got, expected))


@pytest.mark.parametrize("seqlen_k", [77, 300])
@pytest.mark.parametrize("saved", [(False, False), (True, False), (False, True)])
def test_what_is_not_asked_for_changes_nothing(saved: tuple[bool, bool], seqlen_k: int) -> None:
    """But for the last bits of lse, whose sums a compiler fuses otherwise in another kernel."""
    call = row_call(seqlen_k, "range")
    everything = launchers.layout_attention_fwd(*call)
    some = launchers.layout_attention_fwd(*call, with_lse=saved[0], with_stats=saved[1])
    assert torch.equal(some[0], everything[0])
    for got, full, wanted in zip(some[1:], everything[1:], saved):
        assert torch.allclose(got, full, rtol=2.0**-22, atol=0) if wanted else got.numel() == 0


@pytest.mark.parametrize(
    ("argument", "bad", "message"),
    [
        ("q", lambda x: x.double(), "k must have q's dtype float64"),
        ("k", lambda x: x[..., :7], "k must have shape"),
        ("q_regions", lambda x: x[:3], "q_regions must have shape"),
        ("strength", lambda x: x[..., :2], "strength must have shape"),
        ("strength", lambda x: x.double(), "strength must be float32, got float64"),
        (
            "modulation",
            lambda _: "min",
            "modulation must be one of range, max, bias, mask, got 'min'",
        ),
        ("scale", lambda _: float("nan"), "scale must be finite, got nan"),
        *[("q_order", lambda x: x * 0, "q_order must be a permutation of the tokens")]
        * INTERPRETED,  # no GPU is asked
        (
            "q_regions",
            lambda x: x.to("meta"),
            "q_regions must be on \\w+ like the first tensor, got meta",
        ),
    ],
)
def test_raw_calls_are_refused(argument: str, bad: object, message: str) -> None:
    inputs = make_inputs(CASE["ordered"], torch.float32)
    arguments = {
        **{name: getattr(inputs, name) for name in ("q", "k", "v", "q_regions", "k_regions")},
        "strength": inputs.strength.expand(inputs.q.shape[:3]),
        "modulation": "range",
        "scale": 0.2,
        "q_order": inputs.orders["q_order"],
    }
    arguments[argument] = bad(arguments[argument])
    with pytest.raises(RuntimeError, match=message):
        triton.layout_attention_fwd(*arguments.values(), None, *NO_LISTS)


def test_torch_compile_sees_one_op() -> None:
    """Forward and backward without a graph break."""
    inputs = make_inputs(Case("compiled", (1, 1, 20, 21, 16)), torch.float32)

    def attention(*tensors: torch.Tensor) -> tuple:
        return layout_attention(*tensors, return_lse=True, backend="triton")

    eager = evaluate(attention, inputs)
    compiled = evaluate(torch.compile(attention, fullgraph=True, backend="aot_eager"), inputs)
    for name, result in eager.items():
        assert torch.equal(result, compiled[name]), name


def test_opcheck() -> None:
    inputs = make_inputs(Case("opcheck", (1, 1, 5, 6, 16)), torch.float32)
    tensors = inputs.q, inputs.k, inputs.v, inputs.q_regions, inputs.k_regions
    arguments = (*tensors, inputs.strength.expand(1, 1, 5).contiguous())
    rest = ("range", 0.25, None, None)
    out, _, stats = triton.layout_attention_fwd(*arguments, *rest, *NO_LISTS)
    torch.library.opcheck(triton.layout_attention_fwd, (*arguments, *rest, *NO_LISTS))
    backward = (inputs.grad_out, inputs.grad_lse, *arguments, out, stats, *rest)
    torch.library.opcheck(triton.layout_attention_bwd, backward)
