"""Resized layouts: nearest pixels, and the cells of a region that these would lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_attn import Layout

SIDES = st.integers(1, 70)


@st.composite
def few_pixels(draw: st.DrawFn) -> Tensor:
    """Masks of a strip or of scattered pixels, which a coarse grid's nearest pixels miss."""
    regions, height, width = draw(st.integers(1, 6)), draw(SIDES), draw(SIDES)
    masks = torch.zeros(regions, height, width, dtype=torch.bool)
    for mask in masks:
        y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        shape = draw(st.sampled_from(("row", "column", "pixel", "scattered", "all")))
        rows = slice(None) if shape in ("column", "all") else slice(y, y + draw(st.integers(1, 3)))
        columns = slice(None) if shape in ("row", "all") else slice(x, x + draw(st.integers(1, 3)))
        mask[rows, columns] = True
        if shape == "scattered":
            mask[draw(st.integers(0, height - 1)) :: 7, draw(st.integers(0, width - 1)) :: 5] = True
    return masks


def regions_of(layout: Layout, height: int, width: int) -> Tensor:
    """The masks that words say: bool [R, height, width]."""
    words = layout.query_regions(height, width).view(height, width)
    return torch.stack([(words >> r) & 1 == 1 for r in range(len(layout))])


def by_definition(mask: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Tokens whose nearest pixel is in a mask, and those whose cell holds a part of a pixel."""
    nearest, cells = torch.zeros(2, height, width, dtype=torch.bool)
    (rows, columns), pixels = mask.shape, set(map(tuple, mask.nonzero().tolist()))
    for y in range(height):
        across_y = range(y * rows // height, -(-(y + 1) * rows // height))
        for x in range(width):
            across_x = range(x * columns // width, -(-(x + 1) * columns // width))
            nearest[y, x] = (across_y[0], across_x[0]) in pixels
            cells[y, x] = any((i, j) in pixels for i in across_y for j in across_x)
    return nearest, cells


@settings(max_examples=60, deadline=None)
@given(few_pixels(), st.integers(1, 20), st.integers(1, 20))
def test_every_region_has_a_token_on_every_grid(masks: Tensor, height: int, width: int) -> None:
    """Regions that nearest pixels keep are theirs to the bit; others take each cell they touch."""
    resized = regions_of(Layout(masks), height, width)
    sampled = torch.nn.functional.interpolate(masks[None].byte(), (height, width), mode="nearest")[
        0
    ].bool()
    for region, mask, nearest in zip(resized, masks, sampled):
        assert region.any()
        _, cells = by_definition(mask, height, width)
        assert torch.equal(region, nearest if nearest.any() else cells)


@settings(max_examples=30, deadline=None)
@given(few_pixels(), st.integers(1, 20), st.integers(1, 20))
def test_areas_strengths_and_orders_are_those_of_the_words(
    masks: Tensor, height: int, width: int
) -> None:
    layout = Layout(masks)
    regions = regions_of(layout, height, width).flatten(1).double()  # [R, height*width]
    area = (regions * regions.mean(1, keepdim=True)).sum(0)
    torch.testing.assert_close(layout.area(height, width).double(), area, rtol=1e-6, atol=0)
    strength = layout.strength(height, width, weight=1.0, time=1.0, size_weight=0.5).double()
    torch.testing.assert_close(strength, 1 - 0.5 * area, rtol=1e-6, atol=1e-6)
    words = layout.query_regions(height, width)
    assert torch.equal(layout.order(height, width), words.argsort(stable=True).int())


def test_a_line_stays_a_line() -> None:
    """6 of 512 columns, between those of every 8th that a grid of 64 takes."""
    masks = torch.zeros(2, 512, 512, dtype=torch.bool)
    masks[0, :, 201:207] = True
    masks[1, 1:4, 300:450] = True  # and a part of a row
    column, row = regions_of(Layout(masks), 64, 64)
    assert column.nonzero()[:, 1].unique().tolist() == [25]
    assert column.all(0).sum() == 1
    assert row.nonzero().tolist() == [[0, x] for x in range(37, 57)]


def test_words_and_areas_compile_to_one_graph() -> None:
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 3, 3] = True
    layout = Layout(masks)

    @torch.compile(backend="eager", fullgraph=True)
    def made(x: Tensor) -> Tensor:
        return x + layout.query_regions(8, 8) + layout.area(8, 8)

    assert torch.equal(made(torch.zeros(64)), layout.query_regions(8, 8) + layout.area(8, 8))


THIN = {
    "column": (slice(None), slice(201, 207)),
    "row": (slice(297, 303), slice(None)),
    "pixel": (slice(3, 4), slice(509, 510)),
}


@pytest.mark.parametrize("thin", THIN)
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_thin_regions_in_a_run(family: str, thin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The finest attention of a run has tokens of both regions."""
    pipelines = pytest.importorskip("pipelines")
    from dense_attn.integrations.diffusers import apply_layout
    from dense_attn.integrations.diffusers.state import LayoutState

    mask = torch.zeros(512, 512, dtype=torch.bool)
    mask[THIN[thin]] = True
    sides, tokens = [], []
    make, attend = LayoutState.image_side, LayoutState.attend
    monkeypatch.setattr(
        LayoutState, "image_side", lambda *args: sides.append(make(*args)) or sides[-1]
    )
    monkeypatch.setattr(
        LayoutState, "attend", lambda *args: tokens.append(args[2].shape[2]) or attend(*args)
    )
    with apply_layout(
        pipelines.pipeline(family), pipelines.PROMPT, [("cat", mask), ("dog", ~mask)]
    ):
        pipelines.latents(pipelines.pipeline(family), steps=4)
    words = [side.words for side in sides if side.words.shape[1] <= max(tokens)]
    finest = [x for x in words if x.shape[1] == max(x.shape[1] for x in words)]
    assert finest
    assert all(((x >> r) & 1).any() for x in finest for r in range(2))
