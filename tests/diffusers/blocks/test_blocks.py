"""Blocks of pairs that a layout touches: words, strengths, dense references, what is left alone."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from pipelines import PROMPT, REGIONS, close, latents, pipeline
from torch import Tensor

from dense_attn import layout_attention
from dense_attn.integrations.diffusers import apply_layout, layers
from dense_attn.integrations.diffusers.layers import Side
from dense_attn.integrations.diffusers.options.blocks import BLOCKS, words

pytestmark = pytest.mark.usefixtures("one_thread")
SUBSETS = [subset for size in (1, 2, 3, 4) for subset in combinations(BLOCKS, size)]
every_subset = pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
# text tokens, and those of "cat" and "dog": of T5, and of CLIP (16) and T5 one behind the other
TEXTS = {
    "flux": (24, (((2, 6),), ((6, 10),))),
    "sd3": (40, (((2, 5), (18, 22)), ((5, 8), (22, 26)))),
}
every_model = pytest.mark.parametrize("model", TEXTS)


def side(tokens: list[int], text: list[bool]) -> Side:
    both = torch.tensor([tokens], dtype=torch.int32), torch.zeros(1, len(tokens))
    return Side(*both, torch.tensor([text]))


@every_subset
@pytest.mark.parametrize("masked", [False, True], ids=["bias", "mask"])
@pytest.mark.parametrize("high", [1, 15], ids=["two regions", "sixteen"])
def test_words_meet_in_the_pairs_of_the_blocks_alone(
    subset: tuple[str, ...], masked: bool, high: int
) -> None:
    """A text of five tokens, an image of four and a register, every pair by the rule."""
    far = 1 << high
    tokens, text = [0, 1, 1, far, 0, 1, far, 0, 1 | far, 0], [True] * 5 + [False] * 5
    one = side(tokens, text)
    q_words, k_words = words(one, one, subset, masked)
    for i, row in enumerate(tokens):
        for j, column in enumerate(tokens):
            kinds = "->".join("text" if text[n] else "image" for n in (i, j))
            right = bool(row & column)
            if masked:
                right |= not row or not column
            if kinds not in subset:
                right = masked
            assert bool(q_words[0, i] & k_words[0, j]) == right, (kinds, i, j)


def members(model: str) -> tuple[Tensor, Tensor]:
    """Which tokens belong to each region [2, N], and which are of the text [N]."""
    count, spans = TEXTS[model]
    text, image = torch.zeros(2, count), torch.zeros(2, 4, 6)  # 8 x 12 latents, patches of 2 x 2
    for region, places in zip(text, spans):
        for start, stop in places:
            region[start:stop] = 1
    image[0, :, :3] = 1  # the left half
    image[1, 1:, 3:] = 1  # from a fifth down, by the latents at the corners of tokens
    sides = [(text, torch.ones(count)), (image.flatten(1), torch.zeros(24))]
    inside, kinds = zip(*(sides if model == "flux" else sides[::-1]))
    return torch.cat(inside, 1).bool(), torch.cat(kinds).bool()


def dense(model: str, subset: tuple[str, ...], strengths: tuple[float, float]) -> Tensor:
    """The biases of all pairs [N, N]: of text rows and image rows `strength * (1 - area)`."""
    inside, text = members(model)
    area = inside[:, ~text].float().mean(1)  # [2]
    bias = torch.zeros(len(text), len(text))
    for i in range(len(text)):
        for j in range(len(text)):
            kinds = "->".join("text" if text[n] else "image" for n in (i, j))
            if kinds in subset and (inside[:, i] & inside[:, j]).any():
                share = float(area[inside[:, i]].sum())
                bias[i, j] = strengths[0 if text[i] else 1] * (1 - share)
    return bias


def watch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple, dict, Tensor]]:
    """The arguments and the result of every call of layout_attention."""
    seen, original = [], layers.layout_attention

    def watched(*args: Tensor, **options: object) -> Tensor:
        seen.append((args, options, original(*args, **options)))
        return seen[-1][-1]

    monkeypatch.setattr(layers, "layout_attention", watched)
    return seen


@pytest.mark.parametrize(
    ("model", "subset"),
    [
        # of every size, a bit a region and two bits
        pytest.param(
            model, subset, marks=() if model == "flux" and i % 3 == 0 else pytest.mark.full
        )
        for model in TEXTS
        for i, subset in enumerate(SUBSETS)
    ],
)
def test_a_bias_equals_the_dense_matrix(
    model: str, subset: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text rows take cross_weight, image rows self_weight where image->image is touched."""
    seen, cross, own = watch(monkeypatch), 2.5, 1.5
    if "image->image" not in subset or {"text->image", "text->text"}.isdisjoint(subset):
        own = cross  # no row has the other
    with apply_layout(
        pipeline(model),
        PROMPT,
        REGIONS,
        modulation="bias",
        blocks=subset,
        cross_weight=cross,
        self_weight=own,
        exponent=0,
    ):
        latents(pipeline(model), steps=1)
    bias = dense(model, subset, (cross, own if "image->image" in subset else cross))
    assert seen
    image = ~members(model)[1]
    for (q, k, v, *_), options, out in seen:
        alone = q.shape[2] == 24  # layers of the image alone
        right = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=bias[image][:, image] if alone else bias, scale=options["scale"]
        )
        plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=options["scale"])
        torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(out, plain, rtol=1e-3, atol=1e-3)


@every_model
@pytest.mark.parametrize("modulation", ["max", "bias", "mask"])
def test_rows_without_a_touched_pair_keep_their_bits(
    model: str, modulation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the text under image->text alone, and of the image under text->text alone."""
    text, seen = members(model)[1], watch(monkeypatch)
    for subset in ("image->text", "text->text"):
        with apply_layout(pipeline(model), PROMPT, REGIONS, modulation=modulation, blocks=subset):
            latents(pipeline(model), steps=1)
        rows = text if subset == "image->text" else ~text
        for (q, k, v, *_), options, out in seen:
            none = torch.zeros(1, q.shape[2], dtype=torch.int32)
            plain = layout_attention(q, k, v, none, none, 0.0, scale=options["scale"])
            assert torch.equal(out[:, :, rows], plain[:, :, rows])
            assert not torch.equal(out[:, :, ~rows], plain[:, :, ~rows])
        seen.clear()


@every_model
def test_under_a_mask_other_blocks_stay_as_they_are(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule written out: a token of a region loses the words of other regions, no more."""
    seen, (inside, text) = watch(monkeypatch), members(model)
    with apply_layout(pipeline(model), PROMPT, REGIONS, modulation="mask", blocks=["image->text"]):
        latents(pipeline(model), steps=1)
    none = ~inside.any(0)
    meets = (inside.T[:, None] & inside.T[None]).any(-1) | none[:, None] | none
    visible = meets | text[:, None] | ~text
    assert not visible.all()
    for (q, k, v, *_), options, out in seen:
        right = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, scale=options["scale"]
        )
        torch.testing.assert_close(out, right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "modulation", ["max", pytest.param("bias", marks=pytest.mark.full), "mask"]
)
@pytest.mark.parametrize("model", ["flux", pytest.param("sd3", marks=pytest.mark.full)])
def test_whole_runs_of_blocks_equal_the_reference(model: str, modulation: str) -> None:
    pipe, results = pipeline(model), []
    plain = latents(pipe, steps=4)
    for backend in ("auto", "reference"):
        with apply_layout(
            pipe,
            PROMPT,
            REGIONS,
            modulation=modulation,
            blocks=("image->text", "text->image"),
            active=1.0,
            backend=backend,
        ):
            results.append(latents(pipe, steps=4))
    assert close(*results)
    assert not close(results[0], plain)


def test_layers_of_the_image_alone_are_touched_by_image_to_image(calls: list) -> None:
    """Layers that Stable Diffusion 3.5 has beside joint attention."""
    counts = {}
    for subset in (("image->text",), ("image->image",), ("image->text", "image->image")):
        with apply_layout(pipeline("sd3"), PROMPT, REGIONS, modulation="bias", blocks=subset):
            latents(pipeline("sd3"), steps=1)
        counts[subset] = [call[1].shape[2] for call in calls]
        calls.clear()
    joint, alone = TEXTS["sd3"][0] + 24, 24
    assert set(counts["image->text",]) == {joint}
    assert set(counts["image->image",]) == {joint, alone}
    assert counts["image->image",] == counts["image->text", "image->image"]


@pytest.mark.parametrize("model", ["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def test_a_u_net_has_a_block_in_each_kind_of_layers(model: str) -> None:
    pipe = pipeline(model)
    for block, other in (("image->text", "self_weight"), ("image->image", "cross_weight")):
        results = []
        for options in ({"blocks": block}, {other: 0}):
            with apply_layout(pipe, PROMPT, REGIONS, **options):
                results.append(latents(pipe, steps=4))
        assert torch.equal(*results)
