"""Layout: words, areas, strengths and orders against their definitions, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from case_tensors import SIGN_BIT
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_attn import Layout
from dense_attn.demo.scene import load_scene

HALVES = torch.zeros(2, 4, 4, dtype=torch.bool)
HALVES[0, :, :2] = True
HALVES[1, :, 2:] = True


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """1 to 32 random masks, of at least one pixel each."""
    regions, height, width = (
        draw(st.integers(1, 32)),
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    drawn = torch.rand((regions, height, width), generator=generator) < draw(
        st.sampled_from((0.1, 0.5, 0.9))
    )
    drawn[:, height // 2, width // 2] = True
    return drawn


def words_by_definition(masks: Tensor, height: int, width: int) -> list[int]:
    """Token (y, x)'s nearest pixel is (floor(y*H/h), floor(x*W/w)); an int32's bit 31 its sign."""
    _, grid_height, grid_width = masks.shape
    words = []
    for y in range(height):
        for x in range(width):
            covered = masks[:, y * grid_height // height, x * grid_width // width]
            word = sum(1 << r for r, inside in enumerate(covered.tolist()) if inside)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


@settings(max_examples=40, deadline=None)
@given(masks(), st.sampled_from((1, 2, 4)), st.sampled_from((1, 3)))
def test_words_are_the_bits_of_the_nearest_masks(masks: Tensor, up: int, across: int) -> None:
    height, width = masks.shape[1] * up, masks.shape[2] * across
    words = Layout(masks).query_regions(height, width)
    assert words.dtype == torch.int32
    assert words.tolist() == words_by_definition(masks, height, width)


def test_words_at_a_lower_resolution_take_every_eighth_pixel() -> None:
    masks = torch.rand(5, 64, 64) < 0.5
    words = Layout(masks).query_regions(8, 8)
    assert words.tolist() == words_by_definition(masks[:, ::8, ::8], 8, 8)


def test_region_31_is_the_sign_bit() -> None:
    masks = torch.ones(32, 1, 2, dtype=torch.bool)
    masks[:31, 0, 1] = False
    layout = Layout(masks, [None] * 31 + [(1, 2)])
    assert layout.query_regions(1, 2).tolist() == [-1, SIGN_BIT]
    assert layout.token_regions(3).tolist() == [0, SIGN_BIT, 0]


@settings(max_examples=30, deadline=None)
@given(masks())
def test_area_is_the_summed_share_of_a_tokens_regions(masks: Tensor) -> None:
    height, width = masks.shape[1:]
    share = masks.double().mean((1, 2))  # [R]
    expected = torch.einsum("rhw,r->hw", masks.double(), share).flatten()
    area = Layout(masks).area(height, width)
    assert area.dtype == torch.float32
    torch.testing.assert_close(area.double(), expected, rtol=1e-6, atol=0)


def test_area_counts_pixels_at_the_resolution_asked_for() -> None:
    masks = torch.zeros(1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0] = True
    assert Layout(masks).area(4, 4)[0] == 1 / 16
    assert Layout(masks).area(2, 2).tolist() == [0.25, 0, 0, 0]
    masks[0, 0, 0], masks[0, 1, 1] = False, True
    # No nearest pixel, but one in the cell.
    assert Layout(masks).area(2, 2).tolist() == [0.25, 0, 0, 0]


def test_strength_is_the_formula() -> None:
    layout = Layout(HALVES | HALVES[:1])  # region 1 is everything, region 0 the left half
    left, right = 0.3 * 0.9**2 * (1 - 0.5 * 1.5), 0.3 * 0.9**2 * (1 - 0.5 * 1.0)
    strength = layout.strength(1, 2, weight=0.3, time=0.9, exponent=2, size_weight=0.5)
    assert strength.dtype == torch.float32
    torch.testing.assert_close(strength, torch.tensor([left, right]))
    by_default = layout.strength(1, 2, weight=1.0, time=0.5)  # below 0 where masks overlap
    torch.testing.assert_close(by_default, 0.5**5 * (1 - torch.tensor([1.5, 1.0])))


@settings(max_examples=30, deadline=None)
@given(masks())
def test_order_is_the_permutation_that_sorts_words_and_keeps_raster_order_within(
    masks: Tensor,
) -> None:
    layout = Layout(masks)
    words = layout.query_regions(6, 5).tolist()
    order = layout.order(6, 5)
    assert order.dtype == torch.int32
    assert order.tolist() == sorted(range(30), key=lambda token: words[token])  # sorted() is stable


def test_order_leaves_few_mixed_tiles() -> None:
    """The order is for this: 128 x 64 tiles of one kind; the bound is far below the raster's and
    above the order's.
    """
    layout = load_scene().layout
    words, order = layout.query_regions(64, 64), layout.order(64, 64).long()

    def mixed(words: Tensor) -> float:
        tiles = (
            ((words[:, None] & words) != 0)
            .unflatten(0, (-1, 128))
            .unflatten(2, (-1, 64))
            .float()
            .mean((1, 3))
        )
        return ((tiles > 0) & (tiles < 1)).float().mean().item()

    assert mixed(words) > 0.6
    assert mixed(words[order]) < 0.15


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.none() | st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=32)
)
def test_token_words_are_the_bit_of_the_last_span(drawn: list[tuple[int, int] | None]) -> None:
    spans = [None if span is None else (span[0], span[0] + span[1]) for span in drawn]
    layout = Layout(torch.ones(len(spans), 1, 1, dtype=torch.bool), spans)
    expected = [0] * 20
    for r, span in enumerate(spans):
        for token in range(*span) if span else ():
            expected[token] = SIGN_BIT if r == 31 else 1 << r
    words = layout.token_regions(20)
    assert words.dtype == torch.int32
    assert words.tolist() == expected


LABELS = np.array([[0, 7, 7], [2, 0, 300]])


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64", ">u2", ">i4", "uint32"])
def test_label_map_of_any_integer_dtype(dtype: str) -> None:
    layout = Layout.from_label_map(LABELS.astype(dtype))
    assert layout.query_regions(2, 3).tolist() == [
        0,
        2,
        2,
        1,
        0,
        4,
    ]  # labels 2, 7, 300 are regions 0, 1, 2


def test_label_map_background_is_a_region_when_asked_for() -> None:
    layout = Layout.from_label_map(
        torch.from_numpy(LABELS), [None, (1, 2), (2, 3), (3, 4)], background=True
    )
    assert layout.query_regions(2, 3).tolist() == [1, 4, 4, 2, 1, 8]
    assert layout.token_regions(4).tolist() == [0, 2, 4, 8]


def test_label_map_of_32_labels() -> None:
    layout = Layout.from_label_map(np.arange(33).reshape(3, 11))
    assert len(layout) == 32
    assert layout.query_regions(3, 11).tolist() == [0, *(1 << r for r in range(31)), SIGN_BIT]


def test_label_map_views_and_read_only_arrays() -> None:
    flipped = LABELS[::-1, ::-1]
    flipped.flags.writeable = False
    assert Layout.from_label_map(flipped).query_regions(2, 3).tolist() == [4, 0, 1, 2, 2, 0]


def test_boxes_hold_the_pixels_whose_centres_they_hold() -> None:
    layout = Layout.from_boxes(
        [(0.0, 0.0, 0.5, 1.0), (0.2, 0.25, 1.0, 0.75), (0.0, 0.1, 0.13, 0.13)], size=(4, 4)
    )
    expected = [
        [5, 1, 0, 0],
        [1, 3, 2, 2],
        [1, 3, 2, 2],
        [1, 1, 0, 0],
    ]  # centres at 0.125, 0.375, 0.625, 0.875
    assert layout.query_regions(4, 4).view(4, 4).tolist() == expected


@pytest.mark.parametrize("column", range(5))
def test_a_box_that_begins_at_a_centre_holds_it(column: int) -> None:
    """Centres are as exact as the boxes they are compared with: float32 would put 0.7 below 0.7."""
    layout = Layout.from_boxes([((column + 0.5) / 5, 0.0, 1.0, 1.0)], size=(1, 5))
    assert layout.query_regions(1, 5).tolist() == [0] * column + [1] * (5 - column)


def test_boxes_that_touch_share_no_pixel() -> None:
    layout = Layout.from_boxes([(0.0, 0.0, 0.3, 1.0), (0.3, 0.0, 1.0, 1.0)], size=(7, 5))
    assert set(layout.query_regions(7, 5).tolist()) == {1, 2}


def test_the_layout_keeps_a_copy() -> None:
    for masks in (HALVES.clone(), HALVES.numpy().copy()):
        layout = Layout(masks)
        masks[:] = False
        assert layout.query_regions(1, 2).tolist() == [1, 2]


def test_to_moves_what_is_made() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layout = Layout(HALVES, [(0, 1), None]).to(device)
    made = [layout.query_regions(2, 2), layout.token_regions(3), layout.order(2, 2)]
    made += [layout.area(2, 2), layout.strength(2, 2, weight=1.0, time=1.0)]
    assert {x.device.type for x in made} == {device}
    assert layout.spans == ((0, 1), None)
    assert made[0].tolist() == [1, 2, 1, 2]


def test_repr_says_what_it_holds() -> None:
    assert repr(Layout(HALVES, [(0, 1), None])) == "Layout(2 regions, 4 x 4, spans=((0, 1), None))"


ONE = HALVES[:1]
MANY = np.arange(34)[None]
EMPTY = HALVES.clone()
EMPTY[1] = False
LAYOUT = Layout(ONE, [(2, 5)])
from_labels, from_boxes = Layout.from_label_map, Layout.from_boxes

WRONG_KIND = {
    "masks must be a tensor or a numpy array, got list": lambda: Layout([[True]]),
    "masks must be bool, got float32": lambda: Layout(ONE.float()),
    "masks must be an array of numbers or bools, got <U1": lambda: Layout(np.array([["a"]])),
    "masks must be a strided tensor, got torch.sparse_coo": lambda: Layout(ONE.to_sparse()),
    "spans must be a list with (start, stop) or None for each region, got str": lambda: Layout(
        ONE, "ab"
    ),
    "spans[0] must be a pair (start, stop) or None, got 3": lambda: Layout(ONE, [3]),
    "spans[0] must be an integer, got 2.0": lambda: Layout(ONE, [(1, 2.0)]),
    "label_map must be of an integer dtype, got bool": lambda: from_labels(ONE[0]),
    "label_map must be of an integer dtype, got float64": lambda: from_labels(LABELS / 2),
    "boxes must be a list of (x0, y0, x1, y1), got int": lambda: from_boxes(3, (4, 4)),
    "boxes[0] must be (x0, y0, x1, y1), got (0, 0, 1)": lambda: from_boxes([(0, 0, 1)], (4, 4)),
    "boxes[0] must be a number, got str": lambda: from_boxes([(0, 0, 1, "1")], (4, 4)),
    "width must be an integer, got 4.0": lambda: LAYOUT.query_regions(4, 4.0),
    "width must be an integer, got True": lambda: LAYOUT.order(4, True),
    "weight must be a number, got str": lambda: LAYOUT.strength(4, 4, weight="1", time=0.5),
    "size_weight must be a number, got NoneType": lambda: LAYOUT.strength(
        4, 4, weight=1.0, time=0.5, size_weight=None
    ),
}
WRONG_MEANING = {
    "masks must have 3 dimensions [regions, height, width], got (4, 4)": lambda: Layout(ONE[0]),
    "masks must hold 1 to 32 regions, got 0": lambda: Layout(ONE[:0]),
    "masks must hold 1 to 32 regions, got 33": lambda: Layout(ONE.expand(33, -1, -1)),
    "masks must each hold at least one pixel, got none in region 1": lambda: Layout(EMPTY),
    "masks must each hold at least one pixel, got none in region 0": lambda: Layout(ONE[:, :0]),
    "spans must hold one entry for each of the 1 regions, got 0": lambda: Layout(ONE, []),
    "spans[0] must be at least 0, got -1": lambda: Layout(ONE, [(-1, 2)]),
    "spans[0] must be a pair (start, stop) with start < stop, got (2, 2)": lambda: Layout(
        ONE, [(2, 2)]
    ),
    "label_map must have 2 dimensions [height, width], got (3,)": lambda: from_labels(LABELS[0]),
    "label_map must hold labels from 0 up, got -300": lambda: from_labels(-LABELS),
    "label_map must hold 1 to 32 distinct labels besides 0, the background, got 0": lambda: (
        from_labels(0 * LABELS)
    ),
    "label_map must hold 1 to 32 distinct labels besides 0, the background, got 33": lambda: (
        from_labels(MANY)
    ),
    "label_map must hold 1 to 32 distinct labels, got 33": lambda: from_labels(
        MANY[:, :33], background=True
    ),
    "boxes[0] must be finite, got nan": lambda: from_boxes([(0, 0, 1, float("nan"))], (4, 4)),
    "boxes[0] must have 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got (0.5, 0, 0.5, 1)": lambda: (
        from_boxes([(0.5, 0, 0.5, 1)], (4, 4))
    ),
    "boxes[0] must have 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got (0, 0, 9, 9)": lambda: (
        from_boxes([(0, 0, 9, 9)], (4, 4))
    ),
    "boxes[0] must hold the centre of a pixel of the 4 x 4 grid, got (0, 0, 0.1, 1)": lambda: (
        from_boxes([(0, 0, 0.1, 1)], (4, 4))
    ),
    "boxes must hold 1 to 32 boxes, got 0": lambda: from_boxes([], (4, 4)),
    "size must be a pair (height, width), got 4": lambda: from_boxes([(0, 0, 1, 1)], 4),
    "size[1] must be at least 1, got 0": lambda: from_boxes([(0, 0, 1, 1)], (4, 0)),
    "height must be at least 1, got 0": lambda: LAYOUT.query_regions(0, 4),
    "num_tokens must be at least 1, got 0": lambda: LAYOUT.token_regions(0),
    "num_tokens must be at least 5, the stop of spans[0], got 4": lambda: LAYOUT.token_regions(4),
    "spans must be given to the Layout for its token words, got None": lambda: Layout(
        ONE
    ).token_regions(4),
    "weight must be finite, got inf": lambda: LAYOUT.strength(4, 4, weight=float("inf"), time=0.5),
    "time must be in 0..1 (the timestep divided by 1000), got 801": lambda: LAYOUT.strength(
        4, 4, weight=1.0, time=801
    ),
    "time must be in 0..1 (the timestep divided by 1000), got -1": lambda: LAYOUT.strength(
        4, 4, weight=1.0, time=-1
    ),
    "exponent must be at least 0, got -1": lambda: LAYOUT.strength(
        4, 4, weight=1.0, time=0.5, exponent=-1
    ),
}
REFUSALS = [(TypeError, *item) for item in WRONG_KIND.items()] + [
    (ValueError, *item) for item in WRONG_MEANING.items()
]


@pytest.mark.parametrize(
    ("error", "message", "call"), REFUSALS, ids=[message for _, message, _ in REFUSALS]
)
def test_refusals(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message
