"""Regions with prompts of their own, against attention couple written out, and plain runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pipelines import PROMPT, close, latents, pipeline, state_of
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
WHOLE = (0.0, 0.0, 1.0, 1.0)
LEFT = np.arange(12)[None].repeat(8, 0) < 6
TOP = np.arange(8)[:, None].repeat(12, 1) < 4
RAMP = np.linspace(0, 1, 12)[None].repeat(8, 0)
ALL, NONE = np.ones((8, 12)), np.zeros((8, 12))
GUIDED = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
every_kind = pytest.mark.parametrize("model", ["sd", "sdxl"])


def near(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


class Couple:
    """Attention couple as a processor: `sum_b share_b * softmax(q k_b^T) v_b`, with dense scores.

    Args:
        texts: the blocks [L, C] of each row of the batch.
        shares: of the blocks of each row, [blocks, 8, 12].
        soft: whether a coarser grid takes the means of cells, or their first pixels.
        isolate: how much less self-attention counts tokens with no block in common.
    """

    def __init__(self, texts: list, shares: list, soft: bool, isolate: float) -> None:
        self.texts, self.soft, self.isolate = texts, soft, isolate
        self.shares = [torch.tensor(np.stack(row), dtype=torch.float32) for row in shares]

    def __call__(
        self,
        attn: object,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **_: object,
    ) -> Tensor:
        outs = []
        for i, x in enumerate(hidden_states):
            step = round((96 / len(x)) ** 0.5)
            shares = self.shares[i][:, ::step, ::step].flatten(1)
            if self.soft:
                shares = torch.nn.functional.avg_pool2d(self.shares[i], step).flatten(1)
            if encoder_hidden_states is None:
                inside = (shares > 0).float()
                pairs = torch.where(inside.T @ inside > 0, 0, np.log1p(-self.isolate))
                outs.append(self.attention(attn, x, x, pairs))
                continue
            blocks = [self.attention(attn, x, text) for text in self.texts[i]]
            outs.append(sum(share[:, None] * out for share, out in zip(shares, blocks)))
        return attn.to_out[0](torch.stack(outs))

    def attention(self, attn: object, x: Tensor, text: Tensor, pairs: Tensor | int = 0) -> Tensor:
        tokens = attn.to_q(x), attn.to_k(text), attn.to_v(text)
        q, k, v = (y.unflatten(-1, (attn.heads, -1)).transpose(0, 1) for y in tokens)
        scores = q @ k.mT * q.shape[-1] ** -0.5 + pairs
        return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


@torch.no_grad()
def alone(pipe: object, text: str) -> Tensor:
    """The embeddings [L, C] of a text."""
    options = GUIDED | {"do_classifier_free_guidance": False}
    return pipe.encode_prompt(text, **options)[0][0]


def coupled(
    pipe: object,
    rows: list[list[str]],
    shares: list,
    prompt: object = PROMPT,
    *,
    soft: bool = False,
    isolate: float = 0.0,
    **call: object,
) -> Tensor:
    """A run with attention couple; rows: the texts of each row of the batch."""
    texts = [[alone(pipe, text) for text in row] for row in rows]
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(Couple(texts, shares, soft, isolate))
    try:
        return latents(pipe, prompt, steps=3, **call)
    finally:
        pipe.unet.set_attn_processor(before)


def ours(
    pipe: object, regions: list, prompt: object = PROMPT, *, call: dict, **options: object
) -> Tensor:
    with apply_layout(pipe, prompt, regions, **options):
        return latents(pipe, "cat" if prompt is None else prompt, steps=3, **call)


SHARES = {
    # masks, weights, base_ratio, and the shares of the call's prompt and the two regions
    "disjoint": ((LEFT, ~LEFT), (1.0, 3.0), 0.0, (NONE, LEFT, ~LEFT)),
    "gaps": ((LEFT & TOP, ~LEFT & ~TOP), (1.0, 1.0), 0.0, (LEFT ^ TOP, LEFT & TOP, ~(LEFT | TOP))),
    "base": ((LEFT, ~LEFT), (1.0, 1.0), 0.25, (0.25 * ALL, 0.75 * LEFT, 0.75 * ~LEFT)),
    "overlap": (
        (LEFT, TOP),
        (1.0, 3.0),
        0.0,
        (~LEFT & ~TOP, LEFT * (1 - 0.75 * TOP), TOP * (1 - 0.25 * LEFT)),
    ),
    "background": (
        (ALL == 1, LEFT & TOP),
        (1.0, 1.0),
        0.0,
        (NONE, 1 - 0.5 * (LEFT & TOP), 0.5 * (LEFT & TOP)),
    ),
}
CALLS = {"disjoint": 1, "gaps": 1, "base": 2, "overlap": 2, "background": 2}


@pytest.mark.parametrize("case", SHARES)
@every_kind
def test_runs_equal_attention_couple(model: str, case: str, calls: list) -> None:
    """Each token sees the prompts of its regions, by their shares, and negatives are left alone."""
    pipe, (masks, weights, ratio, shares) = pipeline(model), SHARES[case]
    regions = [Region(*given) for given in zip(masks, ("a cat", "dog cat a"), weights)]
    call = {"negative_prompt": "cat"}
    out = ours(pipe, regions, base_ratio=ratio, call=call)
    layers = sum(name.endswith("attn2.processor") for name in pipe.unet.attn_processors)
    assert len(calls) == 3 * layers * CALLS[case]
    rows = [["cat"] * 3, [PROMPT, "a cat", "dog cat a"]]
    assert near(out, coupled(pipe, rows, [[ALL, NONE, NONE], shares], **call))
    assert not close(out, latents(pipe, steps=3, **call))


@pytest.mark.parametrize("prompt", [PROMPT, None], ids=["base", "alone"])
def test_soft_edges(prompt: str | None) -> None:
    """Floats share a token; where they leave a rest the call's prompt has it."""
    pipe, other = pipeline("sd"), (1 - RAMP) * (0.5 if prompt else 1)
    regions = [Region(RAMP, "a cat"), Region(torch.from_numpy(other), "dog cat")]
    call = {"negative_prompt": "dog"}
    shares = [[ALL, NONE, NONE], [1 - RAMP - other, RAMP, other]]
    rows = [["dog"] * 3, [PROMPT, "a cat", "dog cat"]]
    assert near(
        ours(pipe, regions, prompt, call=call), coupled(pipe, rows, shares, soft=True, **call)
    )


def test_negative_prompts_of_regions() -> None:
    """A region without one has the call's, also where the other's tokens are fewer."""
    pipe, call = pipeline("sd"), {"negative_prompt": "a"}
    regions = [Region(LEFT, "a cat"), Region(~LEFT, "dog", negative="cat")]
    shares = [[LEFT, ~LEFT], [LEFT, ~LEFT]]
    right = coupled(pipe, [["a", "cat"], ["a cat", "dog"]], shares, **call)
    assert near(ours(pipe, regions, call=call), right)
    assert not close(right, coupled(pipe, [["a", "a"], ["a cat", "dog"]], shares, **call))
    unguided = {"guidance_scale": 1.0}
    right = coupled(pipe, [["a cat", "dog"]], shares[:1], **unguided)
    assert near(ours(pipe, regions, call=unguided), right)


def test_several_images() -> None:
    """One list of regions each, of different lengths, also none; and several images of each."""
    pipe, prompts = pipeline("sd"), ["a cat", "dog cat", "a dog"]
    regions = [
        [Region(LEFT, "dog"), Region(~LEFT & TOP, "cat"), Region(~LEFT & ~TOP, "a")],
        [],
        [Region(TOP, "cat", negative="dog")],
    ]
    call = {"num_images_per_prompt": 2, "negative_prompt": ["", "cat", "a"]}
    rows = [
        ["", "", "", ""],
        ["cat"],
        ["a", "dog"],
        ["a cat", "dog", "cat", "a"],
        ["dog cat"],
        ["a dog", "cat"],
    ]
    first, last = [NONE, LEFT, ~LEFT & TOP, ~LEFT & ~TOP], [~TOP, TOP]
    shares = [first, [ALL], last, first, [ALL], last]
    doubled = ([side for side in sides for _ in range(2)] for sides in (rows, shares))
    assert near(ours(pipe, regions, prompts, call=call), coupled(pipe, *doubled, prompts, **call))
    shared = ours(pipe, regions[0], ["a cat", "a dog"], call={})
    rows = [[""] * 4, [""] * 4, ["a cat", "dog", "cat", "a"], ["a dog", "dog", "cat", "a"]]
    assert near(shared, coupled(pipe, rows, [first] * 4, ["a cat", "a dog"]))


@every_kind
def test_one_region_of_the_whole_image_is_its_prompt(model: str) -> None:
    """But for the pooled vector of SDXL, which is that of the call's prompt."""
    pipe = pipeline(model)
    out = ours(pipe, [Region(WHOLE, "a cat", weight=0.1)], "dog", call={"negative_prompt": "a"})
    with torch.no_grad():
        embeddings = pipe.encode_prompt("dog", negative_prompt="a", **GUIDED)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds")
    given = dict(zip((*names, "negative_pooled_prompt_embeds"), embeddings))
    given["prompt_embeds"] = alone(pipe, "a cat")[None]
    assert near(out, latents(pipe, None, steps=3, **given))
    assert not close(out, latents(pipe, "dog", steps=3, negative_prompt="a"))


def test_nothing_to_do_is_the_plain_pipeline(calls: list) -> None:
    pipe, regions = pipeline("sd"), [Region(LEFT, "a cat"), Region(~LEFT, "dog")]
    plain, before = latents(pipe, steps=3), state_of(pipe)
    for options in ({"active": 0.0}, {"base_ratio": 1.0}):
        assert torch.equal(ours(pipe, regions, call={}, **options), plain)
    assert calls == []
    assert not close(ours(pipe, regions, call={}), plain)
    assert state_of(pipe) == before
    assert torch.equal(latents(pipe, steps=3), plain)


@pytest.mark.parametrize("isolate", [0.6, 1.0])
def test_isolated_regions(isolate: float) -> None:
    """Tokens of another region, or of none, count less in self-attention, of one prompt's rows."""
    pipe, call = pipeline("sd"), {"guidance_scale": 1.0}
    regions = [Region(LEFT & TOP, "a cat"), Region(~LEFT, "dog")]
    shares = [[LEFT & ~TOP, LEFT & TOP, ~LEFT]]
    rows = [[PROMPT, "a cat", "dog"]]
    out = ours(pipe, regions, call=call, isolate=isolate)
    with np.errstate(divide="ignore"):
        right = coupled(pipe, rows, shares, isolate=isolate, **call)
    assert near(out, right)
    assert not close(out, coupled(pipe, rows, shares, **call))


def test_the_window_of_steps(calls: list) -> None:
    """Parts of the steps, from the first or between two."""
    pipe, regions = pipeline("sd"), [Region(LEFT, "a cat"), Region(~LEFT, "dog")]
    layers = sum(name.endswith("attn2.processor") for name in pipe.unet.attn_processors)
    seen: list[Tensor] = []
    keep = pipe.unet.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    latents(pipe, steps=4)
    plain = seen.copy()
    for active, steps in ((0.5, (0, 1)), ((0.5, 1.0), (2, 3)), ([0.25, 0.5], (1,))):
        seen.clear()
        calls.clear()
        with apply_layout(pipe, PROMPT, regions, active=active):
            latents(pipe, steps=4)
        assert len(calls) == len(steps) * layers
        for step in range(steps[0] + 1):
            assert torch.equal(seen[step], plain[step]) == (step < steps[0])
    keep.remove()


def test_every_second_layer(calls: list) -> None:
    """The others see the call's prompt alone."""
    pipe, regions = pipeline("sd"), [Region(WHOLE, "a cat")]
    layers = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    out = ours(pipe, regions, call={}, every=2)
    assert len(calls) == 3 * len(layers[::2])
    assert not close(out, latents(pipe, steps=3))
    assert not close(out, ours(pipe, regions, call={}))
    calls.clear()
    first = ours(pipe, regions, call={}, every=100)
    assert len(calls) == 3
    before = pipe.unet.attn_processors
    texts = [[alone(pipe, "")], [alone(pipe, "a cat")]]
    couple = Couple(texts, [[ALL], [ALL]], soft=False, isolate=0.0)
    pipe.unet.set_attn_processor(before | {layers[0]: couple})
    right = latents(pipe, steps=3)
    pipe.unet.set_attn_processor(before)
    assert near(first, right)
