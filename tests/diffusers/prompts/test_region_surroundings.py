"""Regions with prompts beside what a pipeline may have, and what is refused with it untouched."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from pipelines import PROMPT, REGIONS, close, diffusers, latents, pipeline, state_of
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Edit, Region, apply_layout, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")
MASK = np.arange(12)[None].repeat(8, 0) < 6
HALVES = [Region(MASK, "a cat"), Region(~MASK, "dog", negative="cat")]
SAME = [Region(MASK, PROMPT), Region(~MASK, PROMPT)]  # what a plain run shows


def with_regions(pipe: object, regions: list = HALVES, **options: object) -> Tensor:
    with apply_layout(pipe, PROMPT, regions, **options):
        return latents(pipe, steps=3)


def near(a: Tensor, b: Tensor) -> bool:
    """To 1e-5 of the largest."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max())


def test_lora() -> None:
    """Its weights count in every region's text, and in the texts' encoders."""
    peft = pytest.importorskip("peft")
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    without = with_regions(pipe)
    pipe.unet.add_adapter(
        peft.LoraConfig(r=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]),
        "style",
    )
    assert not close(with_regions(pipe), without)
    assert near(with_regions(pipe, SAME), latents(pipe, steps=3))
    pipe.unet.disable_adapters()
    assert torch.equal(with_regions(pipe), without)


def test_controlnet() -> None:
    """A ControlNet is a denoiser of its own, which sees the call's prompt."""
    made = tiny_pipeline(diffusers.StableDiffusionPipeline)
    halved = {"conditioning_embedding_out_channels": (4, 8)}
    net = diffusers.ControlNetModel.from_unet(made.unet, **halved).eval()
    for block in net.controlnet_down_blocks:
        torch.nn.init.normal_(block.weight)
    parts = made.components | {"controlnet": net}
    pipe = diffusers.StableDiffusionControlNetPipeline(**parts, requires_safety_checker=False)
    texts: list[Tensor] = []
    net.register_forward_pre_hook(
        lambda _module, _args, kwargs: texts.append(kwargs["encoder_hidden_states"]),
        with_kwargs=True,
    )

    def run() -> Tensor:
        return pipe(
            PROMPT,
            torch.ones(1, 3, 16, 24),
            num_inference_steps=3,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).images

    plain = run()
    with apply_layout(pipe, PROMPT, SAME):
        assert near(run(), plain)
    with apply_layout(pipe, PROMPT, HALVES):
        assert not close(run(), plain)
    assert len(texts) == 9
    assert all(torch.equal(text, texts[0]) for text in texts)


class ImageTokens(torch.nn.Module):
    """The part of a U-Net that gives an IP-Adapter's images to its layers."""

    def forward(self, image_embeds: list[Tensor]) -> list[Tensor]:
        return image_embeds


def test_ip_adapter() -> None:
    """Its images are other calls of the same layers, and are left alone."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    without = latents(pipe, steps=3)
    torch.manual_seed(0)
    for name, layer in pipe.unet.named_modules():
        if name.endswith("attn2"):
            width, depth = layer.to_q.in_features, layer.to_k.in_features
            layer.set_processor(IPAdapterAttnProcessor2_0(width, depth, num_tokens=(4,)))
    depth = pipe.unet.config.cross_attention_dim
    pipe.unet.encoder_hid_proj = ImageTokens()
    pipe.unet.config.encoder_hid_dim_type = "ip_image_proj"
    image = torch.randn(2, 1, 4, depth)

    def run(regions: list | None = None) -> Tensor:
        call = {"ip_adapter_image_embeds": [image]}
        if regions is None:
            return latents(pipe, steps=3, **call)
        with apply_layout(pipe, PROMPT, regions):
            return latents(pipe, steps=3, **call)

    plain = run()
    assert not close(plain, without)
    assert near(run(SAME), plain)
    assert not close(run(HALVES), plain)


@pytest.mark.parametrize("kind", ["AttnProcessor", "SlicedAttnProcessor"])
def test_processors_whose_softmax_is_not_seen(kind: str) -> None:
    from diffusers.models import attention_processor

    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    right, plain = with_regions(pipe), latents(pipe, steps=3)
    made = getattr(attention_processor, kind)
    pipe.unet.set_attn_processor(made(1) if kind.startswith("Sliced") else made())
    assert near(with_regions(pipe), right)
    assert near(latents(pipe, steps=3), plain)


@pytest.mark.full  # a joint model's regions are compiled beside this one's
def test_torch_compile() -> None:
    """One graph with regions and one without; other masks need no other."""
    pipe, moved = tiny_pipeline(diffusers.StableDiffusionPipeline), MASK[:, ::-1].copy()
    other = [Region(moved, "a cat"), Region(~moved, "dog", negative="cat")]
    eager, plain = [with_regions(pipe), with_regions(pipe, other)], latents(pipe, steps=3)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    assert close(latents(pipe, steps=3), plain)
    assert close(with_regions(pipe), eager[0])
    graphs = counter.frame_count
    assert close(with_regions(pipe, other), eager[1])
    assert counter.frame_count == graphs <= 3
    assert close(latents(pipe, steps=3), plain)


def test_blocks_inside_of_blocks() -> None:
    """The innermost counts, also one of phrases; the outer one goes on after it."""
    pipe = pipeline("sd")
    right = with_regions(pipe)
    with apply_layout(pipe, PROMPT, REGIONS):
        phrases = latents(pipe, steps=3)
        assert torch.equal(with_regions(pipe), right)
        assert torch.equal(latents(pipe, steps=3), phrases)
    with apply_layout(pipe, PROMPT, HALVES):
        with apply_layout(pipe, PROMPT, REGIONS):
            assert torch.equal(latents(pipe, steps=3), phrases)
        assert torch.equal(latents(pipe, steps=3), right)


def test_embeddings_of_the_callers_own() -> None:
    """A call's text may be longer than the regions'."""
    pipe = pipeline("sd")
    text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    for copies in (1, 2):
        call = {
            "prompt_embeds": text.repeat(1, copies, 1),
            "negative_prompt_embeds": empty.repeat(1, copies, 1),
        }
        with apply_layout(pipe, None, HALVES):
            assert near(latents(pipe, None, steps=3, **call), with_regions(pipe))


def test_semantic_guidance_is_refused() -> None:
    pipe = pipeline("sd")
    with (
        apply_layout(pipe, PROMPT, HALVES),
        semantic_guidance(pipe, [Edit("fog", warmup=1)]),
        pytest.raises(ValueError, match=r"^pipe must be without semantic guidance while regions h"),
    ):
        latents(pipe, steps=3)


def test_regions_apart_under_the_calls_prompt() -> None:
    """isolate goes on where base_ratio leaves the regions' prompts nothing."""
    pipe, outs = pipeline("sd"), []
    for ratio in (1.0, 0.999998):
        with apply_layout(pipe, PROMPT, HALVES, isolate=1.0, base_ratio=ratio):
            outs.append(latents(pipe, steps=3))
    assert near(*outs)
    assert not close(outs[0], latents(pipe, steps=3))


BOX = (0.0, 0.0, 1.0, 1.0)
ONE = [Region(BOX, "cat")]


@pytest.mark.parametrize(
    ("regions", "options", "kind", "sentence"),
    [
        (
            [*ONE, ("cat", BOX)],
            {},
            TypeError,
            r"regions\[1\] must be a Region as others are, got t",
        ),
        ([Region("left", "cat")], {}, TypeError, r"regions\[0\] must have a bool mask"),
        (
            [Region(2 * MASK.astype(float), "a")],
            {},
            ValueError,
            r"\[0\] must have a mask of values",
        ),
        ([Region(np.zeros((8, 12)), "a")], {}, ValueError, r"must have a mask of at least one pix"),
        ([Region(np.ones(8), "a")], {}, ValueError, r"must have a mask of 2 dimensions"),
        ([Region(MASK.astype(">f4"), "a")], {}, TypeError, r"must have a bool mask, .* ndarray of"),
        ([Region(MASK.astype(object), "a")], {}, TypeError, r"must have a bool mask, .* of object"),
        ([Region(MASK.astype(np.longdouble), "a")], {}, TypeError, r"must have a bool mask, .* of"),
        ([Region(np.full((8, 12), np.nan), "a")], {}, ValueError, r"must have a mask of values in"),
        ([Region(torch.eye(4).to_sparse(), "a")], {}, TypeError, r"\[0\] must be a strided tenso"),
        ([Region(torch.eye(4).bool().to_sparse(), "a")], {}, TypeError, r"must be a strided tenso"),
        ([Region(torch.ones(4, 4, device="meta"), "a")], {}, ValueError, r"got a meta tensor"),
        ([("cat", torch.eye(4, device="meta").bool())], {}, ValueError, r"got a meta tensor"),
        ([Region((0, 0, 2, 1), "a")], {}, ValueError, r"the box of regions\[0\] must have 0 <= x0"),
        (
            [*ONE, Region(MASK, "a"), Region(MASK[1:], "a")],
            {},
            ValueError,
            r"size \(8, 12\) of the",
        ),
        (
            [tuple(ONE)],
            {},
            TypeError,
            r"\[0\]\[0\] must be a pair .*, or a Region in a list, got R",
        ),
        (ONE * 31, {}, ValueError, "regions must hold at most 30 regions with prompts, got 31"),
        ([ONE, ONE], {}, ValueError, "regions must hold one list for each of the 1 prompts, got 2"),
        (ONE, {"active": 1.5}, ValueError, "active must be from 0 to 1, got 1.5"),
        (ONE, {"active": (0.5, 0.2)}, ValueError, "active must have start <= stop"),
        (ONE, {"active": (0.5,)}, ValueError, "active must be a number or a pair"),
        (ONE, {"base_ratio": -1}, ValueError, "base_ratio must be from 0 to 1, got -1"),
        (ONE, {"isolate": "no"}, TypeError, "isolate must be a number, got str"),
        (ONE, {"every": 0}, ValueError, "every must be at least 1, got 0"),
        (ONE, {"every": 1.0}, TypeError, "every must be a whole number, got float"),
        (ONE, {"cross_weight": 0.5}, ValueError, "cross_weight must stay None where regions have"),
        (ONE, {"modulation": "mask"}, ValueError, "modulation must stay None where regions have"),
        (ONE, {"backend": "tpu"}, ValueError, "backend must be one of auto"),
        (REGIONS, {"every": 2}, ValueError, "every must stay 1 where regions have phrases, got 2"),
        (REGIONS, {"active": (0, 1)}, TypeError, "active must be a number, got tuple"),
    ],
)
def test_refusals(
    regions: list, options: dict, kind: type[Exception], sentence: str, calls: list
) -> None:
    pipe = pipeline("sd")
    before = state_of(pipe)
    with pytest.raises(kind, match=sentence), apply_layout(pipe, PROMPT, regions, **options):
        pass
    assert state_of(pipe) == before
    assert calls == []


@pytest.mark.parametrize(
    ("given", "kind", "sentence"),
    [
        ({"prompt": None}, TypeError, "prompt must be a string, got NoneType"),
        ({"weight": 0.0}, ValueError, "weight must be above 0, got 0.0"),
        ({"weight": float("inf")}, ValueError, "weight must be finite in float32, got inf"),
        ({"weight": 1e39}, ValueError, "weight must be finite in float32, got 1e[+]39"),
        ({"weight": 1e-46}, ValueError, "weight must be at least float32's smallest, .* got 1e-46"),
        ({"negative": 3}, TypeError, "negative must be a string or None, got int"),
    ],
)
def test_refusals_of_a_region(given: dict, kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        Region(BOX, **({"prompt": "a"} | given))


def test_gaps_without_a_prompt_of_the_call() -> None:
    pipe = pipeline("sd")
    sentence = (
        "^regions must cover the image where prompt is None, got 48 of 96 pixels in no region"
    )
    with pytest.raises(ValueError, match=sentence), apply_layout(pipe, None, HALVES[:1]):
        pass
    for name, only, wrong in (
        ("base_ratio", "0", 0.5),
        ("every", "1", 2),
        ("active", "the whole run", 0.5),
        ("active", "the whole run", (0.5, 1)),
    ):
        sentence = rf"^{name} must be {only} where prompt is None, got {re.escape(str(wrong))}"
        options = {name: wrong}
        with pytest.raises(ValueError, match=sentence), apply_layout(pipe, None, HALVES, **options):
            pass
