"""apply_layout beside its formula, put in as an override of dense scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from comfyui.scene import (
    KINDS,
    LENGTHS,
    POSITIVE,
    REGION_TEXTS,
    SIGMA,
    estimate,
    made,
    noise,
    regions,
    sigma_of,
)
from torch import Tensor

from dense_attn import Layout
from dense_attn.integrations.comfyui import apply_layout
from dense_attn.reference.layout_attention import modulate

pytestmark = pytest.mark.usefixtures("installed")
TEXT = sum(LENGTHS)
JOINT = KINDS[2:]
BITS = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor(LENGTHS)).int()
SHARES = [float(one.mask.mean()) for one in regions()]


def formula(kind: str, modulation: str, grids: dict[int, tuple[int, ...]]) -> Any:
    """An override with whole scores, by the numbers of docs/diffusers.md."""
    layout = Layout(torch.stack([one.mask > 0.5 for one in regions()]))
    joint, bias = kind in JOINT, kind in JOINT and modulation == "bias"
    time = SIGMA if kind != "UNetModel" else SIGMA * 0.999
    fall = 1.0 if bias else time**5

    def override(
        func: Any, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Any = None, **how: Any
    ) -> Tensor:
        if not how.get("skip_reshape"):
            width = q.shape[-1] // heads
            q, k, v = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v))
        group = q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        count = q.shape[2] if q.shape[2] in grids else q.shape[2] - TEXT
        frames, height, width = grids[count]
        image = layout.query_regions(height, width).repeat(frames)
        own = k.shape[2] == count
        weight = 3.0 if bias else 0.3 if own or joint else 1.0
        strength = layout.strength(height, width, weight=weight, time=1.0).repeat(frames)
        q_words, k_words = image, image if own else BITS
        if q.shape[2] > count:
            theirs = torch.zeros(TEXT) if bias else 1.0 * texts()
            strength = torch.cat([theirs, strength])
            q_words = torch.cat([0 * BITS if bias else BITS, image])
            k_words = torch.cat([BITS, 0 * image if bias else image])
        if bias and own:  # the image's own layers stay as they are
            strength = 0 * strength
        scores = q @ k.transpose(-1, -2) * how.get("scale", q.shape[-1] ** -0.5)
        matched = (q_words[:, None] & k_words) != 0
        scores = modulate(scores, matched, (strength * fall).double(), modulation)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    return override


def texts() -> Tensor:
    """The strengths of a text's tokens as queries."""
    own = torch.tensor([0.0, *(1 - share for share in SHARES)])
    return own.repeat_interleave(torch.tensor(LENGTHS))


def right(kind: str, x: Tensor, modulation: str) -> Tensor:
    model = made(kind)
    height, width = x.shape[-2:]
    halved = -(-height // 2), -(-width // 2)
    frames = x.shape[2] if x.dim() == 5 else 1
    sizes = [(height, width), halved] if kind == "UNetModel" else [halved]
    grids = {frames * math.prod(size): (frames, *size) for size in sizes}
    options = {"optimized_attention_override": formula(kind, modulation, grids)}
    context = torch.cat([POSITIVE[0][0], *(one[0][0] for one in REGION_TEXTS)], 1)
    how = {"c_crossattn": context, "transformer_options": options}
    return model.model.apply_model(x, sigma_of(model), **how)


@pytest.mark.parametrize("modulation", ["auto", "range", "max", "bias"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_estimate_is_the_formulas(kind: str, modulation: str) -> None:
    """Strengths are float32; scores of a few, to two layers."""
    x = noise(kind)
    out = estimate(apply_layout(made(kind), regions(), modulation=modulation), x)
    own = "bias" if kind in JOINT else "range"
    named = own if modulation == "auto" else modulation
    torch.testing.assert_close(out, right(kind, x, named), rtol=0, atol=1e-5)
    assert (out - estimate(made(kind), x)).abs().max() > 1e-3


def test_strengths_are_times_the_models() -> None:
    kind, x = "UNetModel", noise("UNetModel")

    def out(**strengths: float) -> Tensor:
        return estimate(apply_layout(made(kind), regions(), **strengths), x)

    plain, whole = estimate(made(kind), x), out()
    assert torch.equal(out(strength=0, self_strength=0), plain)
    text_alone, image_alone = out(self_strength=0), out(strength=0)
    for one in (text_alone, image_alone, out(strength=0.5, self_strength=0.5)):
        assert (one - plain).abs().max() > 1e-4
        assert (one - whole).abs().max() > 1e-4


def test_a_layout_is_made_once_for_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    made_layers: list[object] = []
    whole = Layout.query_regions

    def counted(self: Layout, *size: int) -> Tensor:
        made_layers.append(size)
        return whole(self, *size)

    monkeypatch.setattr(Layout, "query_regions", counted)
    model, x = apply_layout(made("UNetModel"), regions()), noise("UNetModel")
    first = [estimate(model, x, part=part) for part in (0.95, 0.85, 0.75)]
    assert len(made_layers) == 4  # two grids, of the image alone and with the text
    assert torch.equal(estimate(model, x, part=0.95), first[0])
    assert len(made_layers) == 4
    estimate(model, noise("UNetModel", size=(4, 4)))
    assert len(made_layers) == 8
