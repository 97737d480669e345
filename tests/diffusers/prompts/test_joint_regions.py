"""Regions with prompts in FLUX's joint attention, against dense masks, and plain runs."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pipelines import MODELS, PROMPT, close, diffusers, latents, pipeline, state_of
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Region, apply_layout
from dense_attn.integrations.diffusers.prompts.layers import Layers

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = MODELS["flux"][1]["max_sequence_length"]
ROWS, COLUMNS = 4, 6  # image tokens of 16 x 24 pixels
LEFT = np.arange(COLUMNS)[None].repeat(ROWS, 0) < 3
TOP = np.arange(ROWS)[:, None].repeat(COLUMNS, 1) < 2
ALL, NONE = np.ones((ROWS, COLUMNS)), np.zeros((ROWS, COLUMNS))
TEXTS = ("a cat", "dog cat a")


def near(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


class Dense:
    """FLUX's own processor under a dense mask for each block, added up by shares.

    Args:
        shares: of the blocks, bool or float [blocks, tokens of the image].
        isolate: whether image tokens see only those that share a block with them.
    """

    def __init__(self, shares: Tensor, isolate: bool) -> None:
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        self.own, self.shares = FluxAttnProcessor(), shares
        blocks, inside = len(shares), shares > 0
        owner = torch.arange(blocks).repeat_interleave(LENGTH)
        text = owner[:, None] == owner
        met = inside.float().T @ inside.float() > 0
        self.masks = []
        for block in range(blocks):
            own = (owner == block).expand(shares.shape[1], -1)
            images = met & inside[block] if isolate else torch.ones_like(met)
            upper = torch.cat([text, inside[owner]], 1)
            self.masks.append(torch.cat([upper, torch.cat([own, images], 1)]))

    def __call__(
        self,
        attn: object,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: object = None,
    ) -> object:
        outs = [
            self.own(attn, hidden_states, encoder_hidden_states, mask, image_rotary_emb)
            for mask in self.masks
        ]
        if encoder_hidden_states is not None:
            return self.shared([image for image, _ in outs]), outs[0][1]
        text = self.shares.shape[0] * LENGTH
        image = self.shared([out[:, text:] for out in outs])
        return torch.cat([outs[0][:, :text], image], 1)

    def shared(self, images: list[Tensor]) -> Tensor:
        return sum(share[:, None] * image for share, image in zip(self.shares, images))


@torch.no_grad()
def embeddings(pipe: object, *texts: str) -> dict[str, Tensor]:
    """The blocks of several texts, and the pooled vector of the first."""
    made = [pipe.encode_prompt(text, None, "cpu", max_sequence_length=LENGTH) for text in texts]
    text = torch.cat([one[0] for one in made], 1)
    return {"prompt_embeds": text, "pooled_prompt_embeds": made[0][1]}


def dense(pipe: object, shares: tuple, *texts: str, isolate: bool = False) -> Tensor:
    weights = torch.tensor(np.stack([*shares]), dtype=torch.float32).flatten(1)
    before = pipe.transformer.attn_processors
    pipe.transformer.set_attn_processor(Dense(weights, isolate))
    try:
        return latents(pipe, None, steps=3, **embeddings(pipe, *texts))
    finally:
        pipe.transformer.set_attn_processor(before)


def ours(pipe: object, regions: list, prompt: object = PROMPT, **options: object) -> Tensor:
    with apply_layout(pipe, prompt, regions, **options):
        return latents(pipe, "cat" if prompt is None else prompt, steps=3)


def test_one_region_of_the_whole_image_is_its_prompt() -> None:
    """But for the pooled vector, which is that of the call's prompt."""
    pipe = pipeline("flux")
    plain, before = latents(pipe, steps=3), state_of(pipe)
    given = embeddings(pipe, PROMPT) | {"prompt_embeds": embeddings(pipe, "a cat")["prompt_embeds"]}
    right = latents(pipe, None, steps=3, **given)
    assert near(ours(pipe, [Region((0.0, 0.0, 1.0, 1.0), "a cat")]), right)
    assert not close(right, plain)
    assert state_of(pipe) == before
    assert torch.equal(latents(pipe, steps=3), plain)


SHARES = {
    # masks, base_ratio, the shares of the call's prompt and the two regions, calls of a layer
    "disjoint": ((LEFT, ~LEFT), 0.0, (NONE, LEFT, ~LEFT), 1),
    "gaps": ((LEFT & TOP, ~LEFT), 0.0, (LEFT & ~TOP, LEFT & TOP, ~LEFT), 1),
    "base": ((LEFT, ~LEFT), 0.25, (0.25 * ALL, 0.75 * LEFT, 0.75 * ~LEFT), 2),
    "overlap": ((LEFT, TOP), 0.0, (~LEFT & ~TOP, LEFT * (1 - TOP / 2), TOP * (1 - LEFT / 2)), 2),
}


@pytest.mark.parametrize("case", SHARES)
def test_runs_equal_dense_masks(case: str, calls: list) -> None:
    pipe, (masks, ratio, shares, count) = pipeline("flux"), SHARES[case]
    regions = [Region(mask, text) for mask, text in zip(masks, TEXTS)]
    out = ours(pipe, regions, base_ratio=ratio)
    assert len(calls) == 3 * len(pipe.transformer.attn_processors) * count
    assert near(out, dense(pipe, shares, PROMPT, *TEXTS))
    assert not close(out, latents(pipe, steps=3))


def test_isolated_regions() -> None:
    """Image tokens of another region are not seen, as under the hard masks of others."""
    pipe = pipeline("flux")
    regions = [Region(LEFT & TOP, "a cat"), Region(~LEFT, "dog")]
    shares = (LEFT & ~TOP, LEFT & TOP, ~LEFT)
    out = ours(pipe, regions, isolate=1.0)
    assert near(out, dense(pipe, shares, PROMPT, "a cat", "dog", isolate=True))
    assert not close(out, ours(pipe, regions))


@pytest.mark.parametrize("ratio", [0.25, 0.75, 1.0])
def test_isolated_regions_under_the_calls_prompt(ratio: float) -> None:
    """It shows a region's tokens no other region's, whatever share it has."""
    pipe, regions = pipeline("flux"), [Region(LEFT & TOP, "a cat"), Region(~LEFT, "dog")]
    own = np.stack([LEFT & ~TOP, LEFT & TOP, ~LEFT]).astype(np.float32)
    shares = ratio * np.stack([ALL, NONE, NONE]) + (1 - ratio) * own
    weights = torch.tensor(shares, dtype=torch.float32).flatten(1)
    mixed, flat = Dense(weights, True), torch.from_numpy(own).flatten(1)
    for mask in mixed.masks:
        mask[3 * LENGTH :, 3 * LENGTH :] = flat.T @ flat > 0
    out, before = (
        ours(pipe, regions, isolate=1.0, base_ratio=ratio),
        pipe.transformer.attn_processors,
    )
    pipe.transformer.set_attn_processor(mixed)
    right = latents(pipe, None, steps=3, **embeddings(pipe, PROMPT, "a cat", "dog"))
    pipe.transformer.set_attn_processor(before)
    assert near(out, right)
    assert not close(out, ours(pipe, regions, base_ratio=ratio))


def test_the_others_of_every_second_layer_see_the_calls_prompt_alone() -> None:
    pipe = pipeline("flux")
    regions = [Region(LEFT, "a cat"), Region(~LEFT, "dog")]
    out, before = ours(pipe, regions, every=2), pipe.transformer.attn_processors
    weights = torch.tensor(np.stack([NONE, LEFT, ~LEFT]), dtype=torch.float32).flatten(1)
    on, off = Dense(weights, False), Dense(weights, False)
    off.shares = torch.zeros_like(weights)
    off.shares[0] = 1
    for mask in off.masks:
        mask[:LENGTH, 3 * LENGTH :] = True
    names = [name for name, module in pipe.transformer.named_modules() if name.endswith("attn")]
    mixed = {f"{name}.processor": (on, off)[i % 2] for i, name in enumerate(names)}
    pipe.transformer.set_attn_processor(mixed)
    right = latents(pipe, None, steps=3, **embeddings(pipe, PROMPT, "a cat", "dog"))
    pipe.transformer.set_attn_processor(before)
    assert near(out, right)
    assert not close(out, ours(pipe, regions))


def test_several_images_and_negative_prompts() -> None:
    """Each image alone is the same; the negative prompt is a call of its own, left alone."""
    pipe, prompts = pipeline("flux"), ["a cat", "dog cat"]
    regions = [[Region(LEFT, "dog"), Region(~LEFT & TOP, "cat")], [Region(TOP, "a dog")]]
    noise = torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(1))
    call = {"steps": 3, "true_cfg_scale": 2.0, "negative_prompt": "dog"}
    with apply_layout(pipe, prompts, regions):
        call["negative_prompt"] = ["dog", "dog"]
        both = latents(pipe, prompts, latents=noise, **call)
    call["negative_prompt"] = "dog"
    for b, prompt in enumerate(prompts):
        with apply_layout(pipe, prompt, regions[b]):
            assert near(both[b : b + 1], latents(pipe, prompt, latents=noise[b : b + 1], **call))
    assert not close(both[:1], latents(pipe, prompts[0], latents=noise[:1], **call))


def test_a_compiled_transformer() -> None:
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    regions = [Region(LEFT, "a cat"), Region(~LEFT, "dog")]
    right = ours(pipe, regions)
    torch._dynamo.reset()
    pipe.transformer = torch.compile(pipe.transformer, backend="eager", fullgraph=True)
    assert close(ours(pipe, regions), right)


def test_negative_prompts_of_regions() -> None:
    """The negative prompt's call has them, and a region without one has the call's."""
    pipe, call = pipeline("flux"), {"true_cfg_scale": 2.0}

    def with_regions(*negatives: str | None, whole: str = "a") -> Tensor:
        regions = [Region(m, t, negative=n) for m, t, n in zip((LEFT, ~LEFT), TEXTS, negatives)]
        with apply_layout(pipe, PROMPT, regions):
            return latents(pipe, steps=3, negative_prompt=whole, **call)

    out = with_regions(None, "cat")
    assert not close(out, with_regions(None, None))
    assert not close(out, with_regions("cat", "cat"))
    seen: list[Tensor] = []
    keep = pipe.transformer.register_forward_hook(lambda _m, _a, out: seen.append(out[0]))
    with_regions(None, "cat")
    # the first step's second call is that of one block of texts, "a", and another, "cat"
    dense(pipe, (LEFT, ~LEFT), "a", "cat")
    keep.remove()
    assert near(seen[1], seen[6])


def test_negative_prompts_without_guidance_are_warned_of() -> None:
    pipe, regions = pipeline("flux"), [Region(LEFT, "a cat", negative="dog")]
    with pytest.warns(UserWarning, match="^regions have a negative prompt, and the p") as found:
        ours(pipe, regions)
    assert [Path(each.filename).name for each in found] == [Path(__file__).name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with apply_layout(pipe, PROMPT, regions):
            latents(pipe, steps=2, negative_prompt="a", true_cfg_scale=2.0)
        with apply_layout(pipeline("sd"), PROMPT, regions):
            latents(pipeline("sd"), steps=2)


def test_layers_are_made_once_for_each_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose calls take turns."""
    made, parts = [], Layers.parts
    monkeypatch.setattr(Layers, "parts", lambda self: made.append(self) or parts(self))
    with apply_layout(pipeline("flux"), PROMPT, [Region(LEFT, "a cat", negative="dog")]):
        latents(pipeline("flux"), steps=3, negative_prompt="a", true_cfg_scale=2.0)
    assert len(made) == 2


def test_what_joint_attention_refuses() -> None:
    pipe, regions = pipeline("flux"), [Region(LEFT, "a cat")]
    before = state_of(pipe)
    sentence = "isolate must be 0 or 1 for a FluxTransformer2DModel, got 0.5"
    with (
        pytest.raises(ValueError, match=sentence),
        apply_layout(pipe, PROMPT, regions, isolate=0.5),
    ):
        pass
    assert state_of(pipe) == before
