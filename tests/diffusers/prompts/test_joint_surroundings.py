"""Regions with prompts in joint attention beside what a pipeline may have, and what is refused."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from families import FAMILIES, SHAPES, family, run
from families.classes import kinds, made
from pipelines import close, diffusers
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout
from dense_attn.integrations.diffusers._attention_hook import MARKS
from dense_attn.integrations.diffusers.hooks import arguments
from dense_attn.integrations.diffusers.models.flux import Flux

pytestmark = pytest.mark.usefixtures("one_thread")
LEFT = np.arange(12)[None].repeat(8, 0) < 8  # two of three columns of tokens
HALVES = [Region(LEFT, "a cat"), Region(~LEFT, "dog cat a")]
WHOLE = [Region((0.0, 0.0, 1.0, 1.0), "a cat")]
MASK = {"modulation": "mask", "active": 1.0, "encode_phrases": False}
SEVERAL = "z_image", "wan", "lumina2", "hunyuan_dit", "hunyuan_image"


def near(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def ours(name: str, regions: list = HALVES, **options: object) -> Tensor:
    with apply_layout(family(name), "dog", regions):
        return run(name, "dog", steps=2, **options)


@pytest.mark.parametrize(
    "name", ["qwen", *(pytest.param(x, marks=pytest.mark.full) for x in SEVERAL)]
)
def test_several_images(name: str) -> None:
    """Each alone is the same, of texts of other lengths, in one call."""
    pipe, prompts = family(name), ["dog", "cat" if name == "lumina2" else "a cat dog cat"]
    regions = [HALVES, [Region(~LEFT, "cat", negative="a dog")]]
    given = FAMILIES[name][1] | {"num_inference_steps": 2, "output_type": "latent"}
    given |= {"return_dict": False}
    negatives = given.pop("negative_prompt", "fog")
    shape = run(name, "dog", steps=1).shape
    noise = torch.randn(2, *shape[1:], generator=torch.Generator().manual_seed(1))
    with apply_layout(pipe, prompts, regions):
        changed = prompts[:]  # by Z-Image, in place
        both = pipe(changed, negative_prompt=[negatives] * 2, latents=noise, **given)[0]
    for b, prompt in enumerate(prompts):
        with apply_layout(pipe, prompt, regions[b]):
            alone = pipe(prompt, negative_prompt=negatives, latents=noise[b : b + 1], **given)[0]
        assert near(both[b : b + 1], alone)


@pytest.mark.parametrize(
    ("regions", "options"),
    [(WHOLE, {}), ([("cat", (0.0, 0.0, 1.0, 1.0))], MASK)],
)
def test_layers_whose_scores_a_guider_skips(
    regions: list, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A region of the whole image changes nothing, in the perturbed estimate either."""
    pipe, whole = family("hunyuan_image"), {"perturbed_guidance_start": 0.0}
    plain = run("hunyuan_image", "a cat", steps=2)
    guider = diffusers.PerturbedAttentionGuidance(
        guidance_scale=4.0, perturbed_guidance_layers=[0], perturbed_guidance_stop=1.0, **whole
    )
    monkeypatch.setitem(pipe.__dict__, "guider", guider)
    right = run("hunyuan_image", "a cat", steps=2)
    with apply_layout(pipe, "a cat", regions, **options):
        assert near(run("hunyuan_image", "a cat", steps=2), right)
    assert not close(right, plain)


@pytest.mark.full
def test_a_compiled_transformer_numbers_texts_anew() -> None:
    """One graph with regions and one without, whatever the masks."""
    pipe = family("qwen")
    right, moved = ours("qwen"), [Region(~LEFT, "a cat"), Region(LEFT, "dog cat a")]
    plain, other, own = run("qwen", "dog", steps=2), ours("qwen", moved), pipe.transformer
    assert "forward" not in vars(own.pos_embed)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    pipe.transformer = torch.compile(own, backend=counter, fullgraph=True)
    try:
        assert close(run("qwen", "dog", steps=2), plain)
        before = counter.frame_count
        assert close(ours("qwen"), right)
        graphs = counter.frame_count
        assert close(ours("qwen", moved), other)
        assert counter.frame_count == graphs <= before + 2
        assert close(run("qwen", "dog", steps=2), plain)
    finally:
        pipe.transformer = own


def controlled(pipe: object, prompt: str) -> Tensor:
    given = {"control_image": torch.ones(1, 3, 16, 24), "output_type": "latent", **SHAPES}
    given |= {"num_inference_steps": 2, "max_sequence_length": 24, "return_dict": False}
    return pipe(prompt, generator=torch.Generator().manual_seed(0), **given)[0]


@pytest.mark.full
def test_a_controlnet_of_the_image() -> None:
    """It sees the call's prompt, and the image's tokens get what it makes."""
    pipe = made(kinds()["StableDiffusion3ControlNetPipeline"])
    for block in pipe.controlnet.controlnet_blocks:
        torch.nn.init.normal_(block.weight)
    plain = controlled(pipe, "a dog")
    with apply_layout(pipe, "a dog", [Region((0.0, 0.0, 1.0, 1.0), "a dog")]):
        assert near(controlled(pipe, "a dog"), plain)
    with apply_layout(pipe, "a dog", HALVES):
        assert not close(controlled(pipe, "a dog"), plain)


@pytest.mark.full
def test_a_controlnet_of_image_and_text() -> None:
    """It shares layers of the text, and makes nothing for texts of regions."""
    pipe, given = made(kinds()["ZImageControlNetPipeline"]), []
    for name, block in pipe.controlnet.named_modules():
        if isinstance(block, torch.nn.Linear) and "_proj" in name:
            torch.nn.init.normal_(block.weight, std=0.3)
    plain = controlled(pipe, "a dog")
    with apply_layout(pipe, "a dog", HALVES):
        handle = pipe.transformer.register_forward_pre_hook(
            lambda *call: given.append(arguments(*call).arguments), with_kwargs=True
        )
        assert not close(controlled(pipe, "a dog"), plain)
        handle.remove()
    assert len(given) == 2
    for call in given:
        assert {len(text) for text in call["cap_feats"]} == {3 * 32}
        (made_for,) = call["controlnet_block_samples"].values()
        assert made_for.shape[1] == 32 + 3 * 32  # 24 tokens of an image with their padding
        assert bool(made_for[:, 64:].eq(0).all())
        assert bool(made_for[:, :64].ne(0).any(2).all())


@pytest.mark.full
def test_lora() -> None:
    """Its weights count in every region's text."""
    peft = pytest.importorskip("peft")
    pipe, without = family("lumina2"), ours("lumina2")
    pipe.transformer.add_adapter(
        peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]),
        "style",
    )
    try:
        assert not close(ours("lumina2"), without)
        assert near(ours("lumina2", WHOLE), run("lumina2", "a cat", steps=2))
    finally:
        pipe.transformer.delete_adapters("style")
    assert close(ours("lumina2"), without)


def test_blocks_inside_of_blocks() -> None:
    """Each numbers its own texts, and the last that ends leaves none."""
    pipe, right, cat = family("qwen"), ours("qwen"), run("qwen", "a cat", steps=2)
    with apply_layout(pipe, "dog", WHOLE):
        assert torch.equal(ours("qwen"), right)
        assert near(run("qwen", "dog", steps=2), cat)
    assert "forward" not in vars(pipe.transformer.pos_embed)


def test_what_is_left_of_a_block() -> None:
    """Nothing: of blocks that end in another order, in a copy, and where another put its own."""
    pipe = family("z_image")
    own, place = pipe.transformer, "patchify_and_embed"
    plain = run("z_image", "dog", steps=1)
    outer, inner = (apply_layout(pipe, "dog", regions) for regions in (HALVES, WHOLE))
    outer.__enter__()
    run("z_image", "dog", steps=1)
    copied = copy.deepcopy(own)
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert not close(run("z_image", "dog", steps=1), plain)
    inner.__exit__(None, None, None)
    assert place not in vars(own)
    assert getattr(copied, place).__self__.own.__self__ is copied
    try:
        pipe.transformer = copied
        assert near(run("z_image", "dog", steps=1), plain)
        assert not close(ours("z_image"), plain)
        assert place not in vars(copied)
        pipe.transformer = own
        with apply_layout(pipe, "dog", HALVES):
            run("z_image", "dog", steps=1)
            ours_inside = getattr(own, place)
            setattr(own, place, lambda *given: ours_inside(*given))
        assert torch.equal(run("z_image", "dog", steps=1), plain)
    finally:
        pipe.transformer = own
        vars(own).pop(place, None)


def test_each_of_two_denoisers_has_a_first_layer() -> None:
    pipe = family("wan_2_2")
    with apply_layout(pipe, "dog", HALVES, every=100):
        for denoiser in (pipe.transformer, pipe.transformer_2):
            marks = [vars(block.attn2)[MARKS][-1] for block in denoiser.blocks]
            assert [mark.on for mark in marks] == [True] + [False] * (len(marks) - 1)


def test_records_without_a_place_for_more_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Flux, "longer_text", False)
    sentence = r"^pipe must have a model whose record places texts .*, got ChromaPipeline with Chro"
    with (
        pytest.raises(ValueError, match=sentence),
        apply_layout(family("chroma"), "dog", HALVES),
    ):
        pytest.fail("the block must not run")
