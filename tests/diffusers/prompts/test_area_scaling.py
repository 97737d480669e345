"""Scores of a region's tokens times the image's area over the region's, against the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import family, run
from pipelines import PROMPT, close, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout
from dense_attn.integrations.diffusers.layers import Layer, Side, order_of
from dense_attn.integrations.diffusers.prompts.blocks import Blocks, Rule
from dense_attn.integrations.diffusers.prompts.state import RegionState
from dense_attn.layout_attention.masks import Mask

pytestmark = pytest.mark.usefixtures("one_thread")
ROWS, COLUMNS = np.ogrid[:8, :12]
CAT = (ROWS < 4) & (COLUMNS < 8)  # a third of the image
DOG = (ROWS >= 0) & (COLUMNS >= 4)  # two thirds, and a sixth of it in both
SHARES = np.stack([~CAT & ~DOG, CAT * (1 - 0.5 * DOG), DOG * (1 - 0.5 * CAT)]).astype(np.float32)
FACTORS = 1.0, 3.0, 1.5  # the call's prompt has the whole image
SOFT = np.full((8, 12), 0.25)


class Formula:
    """`sum_b share_b * softmax(area_image / area_b * scale * q k_b^T) v_b`, with dense scores."""

    def __init__(self, sizes: tuple[int, ...], shares: np.ndarray, guided: bool) -> None:
        self.sizes, self.shares, self.guided = sizes, torch.from_numpy(shares), guided
        self.factors = FACTORS

    def __call__(
        self, mark: object, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: object
    ) -> Tensor:
        step = round((96 / q.shape[2]) ** 0.5)
        shares = self.shares[:, ::step, ::step].flatten(1)
        out = torch.zeros_like(q)
        for b in range(len(q)):
            begin, negative = 0, self.guided and b < len(q) // 2
            for size, factor, share in zip(self.sizes, self.factors, shares):
                keys, values = (x[b, :, begin : begin + size] for x in (k, v))
                scores = factor * (q.shape[-1] ** -0.5 if scale is None else scale) * q[b] @ keys.mT
                if mask is not None:
                    there = mask.keys[b % len(mask.keys), begin : begin + size]
                    scores = scores.masked_fill(~there, -torch.inf)
                share = torch.full_like(share, begin == 0) if negative else share
                out[b] += share[:, None] * (scores.softmax(-1) @ values)
                begin += size
        return out


def test_a_unet_equals_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, regions = pipeline("sd"), [Region(CAT, "a cat"), Region(DOG, "dog cat a")]

    def ours(**options: object) -> Tensor:
        with apply_layout(pipe, PROMPT, regions, **options):
            return latents(pipe, steps=3)

    out = ours(area_scaling=True)
    assert not close(out, ours())
    formula = Formula((16, 16, 16), SHARES, guided=True)
    monkeypatch.setattr(RegionState, "attention", lambda _, *given: formula(*given))
    assert bool((out - ours()).abs().max() <= 1e-5 * out.abs().max())
    formula.factors = 1.0, 1.0, 1.0
    assert not close(out, ours())


def test_a_transformer_with_padding_equals_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole image of one region is no factor, and a soft mask has the mean of its values."""
    pipe, regions = family("pixart"), [Region(CAT, "a cat"), Region(DOG, "dog cat a")]

    def ours(regions: list, **options: object) -> Tensor:
        with apply_layout(pipe, PROMPT, regions, **options):
            return run("pixart", PROMPT, steps=2)

    whole = [Region((0.0, 0.0, 1.0, 1.0), "a cat")]
    assert torch.equal(ours(whole, area_scaling=True), ours(whole))
    out, soft = ours(regions, area_scaling=True), ours([Region(SOFT, "a cat")], area_scaling=True)
    assert not close(out, ours(regions))
    formula = Formula((20, 7, 11), SHARES, guided=True)
    monkeypatch.setattr(RegionState, "attention", lambda _, *given: formula(*given))
    assert bool((out - ours(regions)).abs().max() <= 1e-5 * out.abs().max())
    formula.sizes, formula.factors = (20, 7), (1.0, 4.0)
    formula.shares = torch.from_numpy(np.stack([1 - SOFT, SOFT]).astype(np.float32))
    assert bool((soft - ours([Region(SOFT, "a cat")])).abs().max() <= 1e-5 * soft.abs().max())


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float16])
def test_factors_of_float16(mask: torch.dtype | None) -> None:
    """Keys times a factor that leave its range, as one of a small region's does."""
    q, k, v = torch.randn(3, 1, 2, 4, 16, generator=torch.Generator().manual_seed(0)).half()
    k[..., 0] = 40.0
    words = torch.ones(1, 4, dtype=torch.int32)
    side, now = Side(words, words), torch.zeros(1, 1, 1)
    layer = Layer(words, words, now, order_of(side), None, now)
    blocks = Blocks([(layer, None)], torch.full((1, 1, 4, 1), 4096.0))
    there = None if mask is None else Mask(torch.ones(1, 4, dtype=mask))
    out = blocks.attention(q, k, v, None, there, 4, Rule("mask", "reference"))
    right = (4096 / 4 * q.double() @ k.double().mT).softmax(-1) @ v.double()
    assert out.dtype == torch.float16
    assert bool((out - right).abs().max() <= 1e-3 * right.abs().max())


@pytest.mark.parametrize(
    ("name", "value", "kind", "sentence"),
    [
        ("flux", True, ValueError, "area_scaling must be False for a FluxTransformer2DModel, of j"),
        ("sd", 1.0, TypeError, "area_scaling must be a bool, got float"),
    ],
)
def test_refusals(name: str, value: object, kind: type[Exception], sentence: str) -> None:
    regions = [Region(CAT, "a cat")]
    with (
        pytest.raises(kind, match=f"^{sentence}"),
        apply_layout(pipeline(name), PROMPT, regions, area_scaling=value),
    ):
        pytest.fail("the block must not run")
