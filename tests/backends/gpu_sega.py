"""Triton's and CUDA's kernels of semantic guidance against the reference, to the bit: on a GPU,
emulated or interpreted.

Run by test_interpreted, test_emulated, test_cuda_sega and `make gpu`.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton.language as tl
from cases import DEVICES, why_skip
from placed import Placed, same
from torch import Tensor
from triton import jit

from dense_attn import reference
from dense_attn._backends import table, triton
from dense_attn.triton_kernels import sega as _sega
from dense_attn.triton_kernels.sega import selection
from dense_attn.triton_kernels.sega.rows import GROUP, whole_rank_of

NARROW = (torch.float32, torch.bfloat16, torch.float16)
LEVELS = (0.0, 1e-42, 0.123456, 0.5, 0.9, 1 - 2**-53, 1.0)

pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"  # numpy's own
)


def use(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row in one program, by way of memory or not, with all concepts or two at a time, or in
    several programs, however short it is.
    """
    if form == "pairs":
        monkeypatch.setattr(_sega, "UNSTAGED", 512)
    if form == "staged":
        monkeypatch.setattr(_sega, "UNSTAGED", 0)
        monkeypatch.setattr(_sega, "TILE", 64)
    if form == "several":
        monkeypatch.setattr(_sega, "LONGEST", 0)
        monkeypatch.setattr(_sega, "TILE", 64)
        monkeypatch.setattr(selection, "SPAN", 64)
        monkeypatch.setattr(selection, "MAX_PROGRAMS", 20)


@pytest.fixture(params=("whole", "several", "cuda"))
def sega(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Placed:
    """The ops of Triton in one of its forms, or those of CUDA."""
    backend = "cuda" if request.param == "cuda" else "triton"
    if reason := why_skip(backend, "sega_guidance"):
        pytest.skip(reason)
    if backend == "triton":
        use(request.param, monkeypatch)
    return Placed(table.NAMESPACES[backend], DEVICES[backend])


def forms(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("sega", names, indirect=True)


staged_too = forms("whole", "pairs", "staged", "several", "cuda")


def rows(values: str, dtype: torch.dtype, count: int = 140) -> Tensor:
    x = torch.randn(3, count)
    if values == "ties":
        x = x.round()
    elif values == "equal":
        x = x[:, :1].expand(3, count)
    elif values == "denormal":
        x = x * 1e-42
    elif values == "not finite":
        x[0, 5], x[1, 3], x[1, 4], x[2, 7:] = torch.nan, torch.inf, -torch.inf, torch.inf
    elif values == "transposed":
        x = torch.randn(count, 3).t()
    elif values == "one":
        x = x[:, :1]
    return x.to(dtype)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(
    "values", ["normal", "ties", "equal", "denormal", "not finite", "transposed", "one"]
)
def test_percentile_mask(values: str, dtype: torch.dtype, sega: Placed) -> None:
    x = rows(values, dtype)
    for level in LEVELS:
        same(sega.percentile_mask(x, level), reference.percentile_mask(x, level))


@pytest.mark.parametrize("level", [0.1, 0.3, 0.71])
@pytest.mark.parametrize("num_rows", [0, 40])
def test_interpolation(num_rows: int, level: float, sega: Placed) -> None:
    """Between neighbours on either side of the middle, to the last bit."""
    x = torch.randn(num_rows, 7)
    same(sega.percentile_mask(x, level), reference.percentile_mask(x, level))


@forms("several")
def test_many_programs_share_a_row(sega: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than one program adds up at a time: 16 of their counts, 256 of their extremes."""
    for name, value in (("SPAN", 16), ("MAX_PROGRAMS", 100)):
        monkeypatch.setattr(selection, name, value)
    x = torch.randn(1, 16 * 270 + 3)
    same(sega.percentile_mask(x, 0.77), reference.percentile_mask(x, 0.77))


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize(("version", "widest"), [((3, 6), 8), ((3, 8), 11)])
@forms("several")
def test_digits(
    version: tuple[int, int],
    widest: int,
    dtype: torch.dtype,
    sega: Placed,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Narrow ones where a bin costs instructions, wide ones where it costs memory alone."""
    monkeypatch.setattr(selection, "_TRITON", version)
    monkeypatch.setattr(selection, "WARP_SIZE", 32)
    for bits in (31, 18, 15):
        widths = selection.digits(bits)
        assert sum(widths) == bits
        assert widths[0] == max(widths) <= widest
        assert len(widths) == -(-bits // widest)
    x = torch.randn(2, 300).to(dtype)
    same(sega.percentile_mask(x, 0.77), reference.percentile_mask(x, 0.77))


@forms("several")
def test_counts_that_int32_cannot_hold(sega: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "NARROW", 0)
    x = torch.randn(2, 300)
    same(sega.percentile_mask(x, 0.77), reference.percentile_mask(x, 0.77))


@jit
def whole_ranks_kernel(ranks, found_ptr, GROUP: tl.constexpr):  # noqa: ANN001, ANN201
    e = tl.arange(0, GROUP)
    tl.store(found_ptr + e, whole_rank_of(ranks, e, GROUP))


@pytest.mark.parametrize("num_values", [1, 2, 3, 4096, 2**24 + 2, 2**31 + 7, 2**45])
def test_whole_ranks(num_values: int) -> None:
    """Without their fractions, by integers alone."""
    found = torch.zeros(GROUP, dtype=torch.int64, device=triton.DEVICE)
    whole_ranks_kernel[(1,)](selection.ranks_of(LEVELS, num_values), found, GROUP=GROUP)
    assert found.tolist() == [int(level * (num_values - 1)) for level in LEVELS] + [0]


@pytest.mark.parametrize("num_values", [1, 2, 4096, 2**24 + 2, 2**31 + 7])
def test_ranks_of_float64_travel_in_float32(num_values: int) -> None:
    """In pieces that it holds exactly, which together are the bits."""
    pieces = torch.tensor(selection.ranks_of(LEVELS, num_values)).tolist()
    bits = [int(high) << 44 | int(middle) << 22 | int(low) for high, middle, low in zip(*pieces)]
    assert torch.tensor(bits).view(torch.float64).tolist() == [
        level * (num_values - 1) for level in LEVELS
    ] + [0.0]


def test_offsets_beyond_int32_go_to_the_programs_that_have_int64() -> None:
    row = (None, 0, 0, 0, 2**20)
    assert selection.fits_one_program(4096, 2047, row, None)
    assert not selection.fits_one_program(4096, 2048, row)
    assert not selection.fits_one_program(2046, 2047, row)


def guidance(
    num_edits: int, dtype: torch.dtype, view: str = "contiguous", **change: object
) -> tuple[list, dict]:
    batch, channels, height, width = change.pop("size", (1, 2, 9, 15))
    uncond, text, momentum = torch.randn(3, batch, channels, height, width).to(dtype)
    edits = torch.randn(num_edits, batch, channels, height, width).to(dtype)
    if view == "channels_last":
        uncond, text = (x.contiguous(memory_format=torch.channels_last) for x in (uncond, text))
        edits = edits.movedim(2, -1).contiguous().movedim(-1, 2)
    ready = [e % 2 == 0 for e in range(num_edits)]
    options = {
        "guidance_scale": 7.5,
        "edit_guidance_scale": ([5.0, -3.0, 0.7, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5] * 4)[:num_edits],
        "edit_threshold": ([0.9, 0.37, 0.95, 0.0, 1.0, 0.5, 0.6, 0.7, 0.8] * 4)[:num_edits],
        "weights": ([1.0, 2.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.3] * 4)[:num_edits],
        "partials": [0.0] * num_edits,
        "all_warm": True,
        "reverse": [not one for one in ready],
        "edit_momentum_scale": 0.3,
        "edit_mom_beta": 0.4,
        "user_mask": None,
        "sum_channels": False,
    }
    if change.pop("warming", None):
        weights = [0.25 * weight if one else 0.0 for weight, one in zip(options["weights"], ready)]
        options |= {"partials": weights, "all_warm": False}
    if change.pop("masked", None):
        options["user_mask"] = torch.rand(num_edits, 1, 1, height, width).expand(edits.shape)
    return [uncond, text, edits, momentum.float()], options | change


SEGA_CASES = {
    "one": (1, {}),
    "warming": (3, {"warming": True}),
    "cold": (3, {"all_warm": False}),
    "masked": (3, {"masked": True}),
    "summed": (3, {"sum_channels": True, "warming": True, "masked": True}),
    "channels last": (3, {"view": "channels_last"}),
    "two groups": (9, {"warming": True}),
    "none": (0, {}),
    "sums of no channels": (3, {"size": (2, 0, 9, 15), "sum_channels": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", SEGA_CASES)
@staged_too
def test_sega_guidance(name: str, dtype: torch.dtype, sega: Placed) -> None:
    num_edits, change = SEGA_CASES[name]
    arguments, options = guidance(num_edits, dtype, **change)
    same(sega.sega_guidance(*arguments, **options), reference.sega_guidance(*arguments, **options))


@staged_too
def test_sega_guidance_of_what_is_not_finite(sega: Placed) -> None:
    """NaN keeps nothing of its row; an infinity times a weight of 0 is not added."""
    arguments, options = guidance(3, torch.float32, weights=[1.0, 0.0, 1.0])
    arguments[2][0, 0, 0, 3, 4], arguments[2][1, 0, 1, 2, 2] = torch.nan, torch.inf
    got = sega.sega_guidance(*arguments, **options)
    same(got, reference.sega_guidance(*arguments, **options))
    assert got[0].isfinite().all()
    assert got[2][0, 0, 0].isnan()


WIDE = (*NARROW, torch.float64)
LONG = {  # values of a row that CUDA's kernels take in several launches, 1 more than in one
    **dict.fromkeys(NARROW, 16_385),
    torch.float64: 8_193,
}


@forms("cuda")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("values", ["normal", "ties", "not finite", "transposed"])
def test_long_rows(values: str, dtype: torch.dtype, sega: Placed) -> None:
    for count in (LONG[dtype] - 1, LONG[dtype]):
        x = rows(values, dtype, count)
        for level in (0.0, 0.123456, 0.9):
            same(sega.percentile_mask(x, level), reference.percentile_mask(x, level))


CUDA_CASES = {  # of concepts, in launches of 16, whose keys share 96 KiB
    "as-many-as-a-launch": (16, {"size": (1, 1, 40, 50)}),
    "two-launches": (17, {"warming": True, "masked": True}),
    "three-launches": (34, {"sum_channels": True}),
    "one-at-a-time": (3, {"size": (1, 2, 64, 200)}),
    "long": (2, {"size": (1, 2, 130, 130), "warming": True}),
    "long-in-two-launches": (17, {"size": (1, 1, 130, 130), "masked": True}),
    "long-sums": (2, {"size": (1, 3, 130, 130), "sum_channels": True, "masked": True}),
    "long-without-concepts": (0, {"size": (1, 1, 130, 130)}),
}


@forms("cuda")
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", CUDA_CASES)
def test_sega_guidance_in_launches(name: str, dtype: torch.dtype, sega: Placed) -> None:
    num_edits, change = CUDA_CASES[name]
    arguments, options = guidance(num_edits, dtype, **change)
    arguments[3] = arguments[3].to(reference.accumulation_dtype(dtype))
    if options["user_mask"] is not None:
        options["user_mask"] = options["user_mask"].to(arguments[3].dtype)
    same(sega.sega_guidance(*arguments, **options), reference.sega_guidance(*arguments, **options))


X = torch.randn(2, 3)
MASK_REFUSALS: dict[str, tuple[Callable, str]] = {
    "float64": (
        lambda sega: sega.percentile_mask(X.double(), 0.5),
        "x must be one of float32, bfloat16, float16, got",
    ),
    "level": (
        lambda sega: sega.percentile_mask(X, float("nan")),
        "level must be from 0 to 1, got nan",
    ),
    "values": (
        lambda sega: sega.percentile_mask(X[:, :0], 0.5),
        r"x must have 2 dimensions and values in each row, got",
    ),
}


in_words_of_triton = forms("whole")  # C++ has words of its own


@in_words_of_triton
@pytest.mark.parametrize("name", MASK_REFUSALS)
def test_refusals(name: str, sega: Placed) -> None:
    call, message = MASK_REFUSALS[name]
    with pytest.raises(RuntimeError, match=message):
        call(sega)


SEGA_REFUSALS = {
    "text": (1, lambda x: x[:, :1], "eps_text must have shape"),
    "edits": (2, lambda x: x.half(), "eps_edits must be float32, got float16"),
    "momentum": (3, lambda x: x.double(), "momentum must be float32, got float64"),
    "axes": (
        0,
        lambda x: x.repeat(1, 1, 1, 2)[..., ::2].transpose(2, 3).contiguous().transpose(2, 3),
        "collapse",
    ),
}


@in_words_of_triton
@pytest.mark.parametrize("name", SEGA_REFUSALS)
def test_sega_refusals(name: str, sega: Placed) -> None:
    index, change, message = SEGA_REFUSALS[name]
    arguments, options = guidance(1, torch.float32)
    arguments[index] = change(arguments[index])
    with pytest.raises(RuntimeError, match=message):
        sega.sega_guidance(*arguments, **options)


def test_sega_refuses_lists_of_another_length(sega: Placed) -> None:
    arguments, options = guidance(2, torch.float32, partials=[0.0])
    with pytest.raises(RuntimeError, match="partials must have 2 entries, got 1"):
        sega.sega_guidance(*arguments, **options)
