"""Prompts of regions where a layer's or a refiner's text is one: rows beside it, and others."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from families import classes, family, run, video
from families.controlnets import changed
from pipelines import ALL, PROMPT, close, diffusers
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
WHOLE, LEFT, CORNER = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 0.5)
TEXTS = PROMPT, "a cat", "dog cat a"
OWNERS = torch.tensor([1, 2, 1, 0])  # the text of each of a frame's 2 x 2 tokens
REGIONS = [Region(LEFT, TEXTS[1]), Region(CORNER, TEXTS[2])]
OTHERS = [pytest.param(name, marks=pytest.mark.full) for name in ("SkyReelsV2", "ChronoEdit")]


def near(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


@cache
def from_image(name: str) -> object:
    """A pipeline of Wan's attention, with an image's keys before 512 of text."""
    kind = "ChronoEditPipeline" if name == "ChronoEdit" else f"{name}ImageToVideoPipeline"
    pipe = classes.made(getattr(diffusers, kind))
    if name == "Wan":
        sizes = {"image_dim": 8, "added_kv_proj_dim": 24}
        pipe.transformer = changed(pipe.transformer, **sizes).eval()
        pipe.register_modules(**{part: video.vision()[part] for part in ("image_encoder",)})
        pipe.register_modules(image_processor=video.vision()["image_processor"])
    return pipe


def frames(pipe: object, prompt: str = PROMPT, scale: float = 1.0, **more: object) -> Tensor:
    given = {"num_inference_steps": 2, "guidance_scale": scale, "max_sequence_length": 512}
    return classes.call(pipe, prompt=prompt, **given | more).frames


def ours(pipe: object, regions: list, prompt: str = PROMPT, **more: object) -> Tensor:
    with apply_layout(pipe, prompt, regions):
        return frames(pipe, prompt, **more)


def cross(pipe: object) -> list[torch.nn.Module]:
    return [block.attn2 for block in pipe.transformer.blocks]


@torch.no_grad()
def coupled(pipe: object, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """A run in which each layer is called for every text, and a token takes its own's output."""
    embedder, encoded = pipe.transformer.condition_embedder.text_embedder, []
    for text in TEXTS:
        given = {"do_classifier_free_guidance": False, "max_sequence_length": 512}
        encoded.append(embedder(pipe.encode_prompt(text, **given)[0]))

    def forward(x: Tensor, text: Tensor, *rest: object, own: object) -> Tensor:
        image, owners = text[:, :-512], OWNERS.repeat(x.shape[1] // 4)
        outs = torch.stack([own(x, torch.cat([image, one], 1), *rest) for one in encoded])
        return outs[owners, :, torch.arange(len(owners))].transpose(0, 1)

    with monkeypatch.context() as patch:
        for layer in cross(pipe):
            bound = layer.forward
            patch.setattr(layer, "forward", lambda *given, own=bound: forward(*given, own=own))
        return frames(pipe)


@pytest.mark.parametrize("name", ["Wan", *OTHERS])
def test_keys_of_an_image_before_the_texts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention couple's formula, of whole layers."""
    pipe = from_image(name)
    plain, out = frames(pipe), ours(pipe, REGIONS)
    assert near(out, coupled(pipe, monkeypatch))
    assert not close(out, plain)
    assert not any("forward" in vars(layer) for layer in cross(pipe))
    assert torch.equal(frames(pipe), plain)
    negative, call = "fog dog", {"scale": 4.0, "negative_prompt": "cat"}
    right = frames(pipe, scale=4.0, negative_prompt=negative)
    whole = [Region(WHOLE, PROMPT, negative=negative)]
    assert near(ours(pipe, whole, "dog", **call), right)
    assert not close(ours(pipe, [Region(WHOLE, PROMPT)], "dog", **call), right)


@pytest.mark.parametrize("name", ["Wan", *OTHERS])
def test_a_region_without_a_negative_prompt_sees_the_calls(name: str) -> None:
    """Beside one that has it; as if the call's were its own."""
    pipe, call = from_image(name), {"scale": 4.0, "negative_prompt": "cat"}
    own, right = Region(LEFT, TEXTS[1], negative="fog"), (0.5, 0.0, 1.0, 1.0)
    out, same, other = (
        ours(pipe, [own, Region(right, TEXTS[2], negative=negative)], "dog", **call)
        for negative in (None, "cat", "fog")
    )
    assert near(out, same)
    assert not close(out, other)


def test_texts_of_other_lengths() -> None:
    """A caller's own text may have the length that regions' get; else it is refused."""
    pipe, given = from_image("Wan"), {"do_classifier_free_guidance": False}
    encoded = pipe.encode_prompt("dog", max_sequence_length=512, **given)[0]
    right = ours(pipe, REGIONS, "dog")
    with apply_layout(pipe, "dog", REGIONS):
        assert near(frames(pipe, None, prompt_embeds=encoded), right)
    rule = "^prompt_embeds must have the 226 tokens of a text beside those of regions, got 512$"
    cover = [Region(WHOLE, "a cat")]
    with pytest.raises(ValueError, match=rule), apply_layout(pipe, None, cover):
        frames(pipe, None, prompt_embeds=encoded)
    assert not any("forward" in vars(layer) for layer in cross(pipe))


@pytest.mark.parametrize("learned", [True, pytest.param(False, marks=pytest.mark.full)])
def test_places_of_so_many_tokens(learned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CogVideoX 2B and, with places of a text's tokens too, 5B image to video: every text's own."""
    pipe = family("cogvideox")
    places = ("use_rotary_positional_embeddings", "use_learned_positional_embeddings")
    config = dict(pipe.transformer.config) | ALL | dict.fromkeys(places, learned)
    placed = type(pipe.transformer).from_config(config).eval()
    if learned:
        placed.patch_embed.pos_embedding.normal_()
    monkeypatch.setitem(vars(pipe), "transformer", placed)
    right = run("cogvideox", PROMPT, steps=2)
    with apply_layout(pipe, "dog", [Region(WHOLE, PROMPT)]):
        assert near(run("cogvideox", "dog", steps=2), right)
    with apply_layout(pipe, "dog", REGIONS):
        assert not close(run("cogvideox", "dog", steps=2), right)
    assert torch.equal(run("cogvideox", PROMPT, steps=2), right)


@pytest.mark.full
@pytest.mark.parametrize("name", ["hunyuan_image", "hunyuan_video15"])
def test_quoted_words_of_a_regions_own_prompt(name: str) -> None:
    """Their encoder's tokens are the region's, whatever words the call's prompt quotes."""
    pipe, prompt, other = family(name), 'a cat "ad" c', 'dog "cat"'
    right = run(name, prompt, steps=2)
    for own in (other, "dog"):
        with apply_layout(pipe, own, [Region(WHOLE, prompt)]):
            assert near(run(name, own, steps=2), right)
    with apply_layout(pipe, other, [Region(WHOLE, "a cat ad c")]):
        assert not close(run(name, other, steps=2), right)
    halves = [Region(LEFT, prompt), Region((0.5, 0.0, 1.0, 1.0), prompt)]
    with apply_layout(pipe, other, halves):
        shared = run(name, other, steps=1)
    assert not close(shared, run(name, other, steps=1))


@pytest.mark.full
def test_an_images_tokens_before_the_texts() -> None:
    """All regions of HunyuanVideo 1.5's image to video see them."""
    pipe = classes.made(diffusers.HunyuanVideo15ImageToVideoPipeline)
    right = classes.call(pipe, num_inference_steps=2).frames
    with apply_layout(pipe, "dog", [Region(WHOLE, PROMPT)]):
        assert near(classes.call(pipe, prompt="dog", num_inference_steps=2).frames, right)
    with apply_layout(pipe, "dog", REGIONS):
        assert not close(classes.call(pipe, prompt="dog", num_inference_steps=2).frames, right)


@pytest.mark.full
@pytest.mark.parametrize("name", ["hunyuan_dit", "hunyuan_video"])
def test_a_compiled_transformer(name: str) -> None:
    pipe, own = family(name), family(name).transformer

    def regional() -> Tensor:
        with apply_layout(pipe, PROMPT, REGIONS):
            return run(name, PROMPT, steps=2)

    right = regional()
    torch._dynamo.reset()
    pipe.transformer = torch.compile(own, backend="eager", fullgraph=True)
    try:
        assert close(regional(), right)
    finally:
        pipe.transformer = own
