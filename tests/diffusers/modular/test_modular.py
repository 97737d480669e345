"""Layouts on diffusers' modular pipelines: as on others, whatever a guider asks for and when."""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from families.modular import KINDS, classic, modular, ours, theirs
from pipelines import PROMPT, REGIONS, close, latents, pipeline
from torch import Tensor

from dense_attn.integrations.diffusers import (
    Edit,
    Region,
    apply_layout,
    semantic_guidance,
    semantic_guider,
)
from dense_attn.integrations.diffusers.modular.pipeline import viewed
from dense_attn.integrations.diffusers.text.reading import Reading

modular_pipelines = pytest.importorskip("diffusers.modular_pipelines")
from diffusers.guiders import ClassifierFreeGuidance, SkipLayerGuidance  # noqa: E402
from diffusers.hooks import LayerSkipConfig  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
TAKES_REGIONS = sorted(KINDS.keys() - {"sdxl"})
PROMPTS = [
    Region((0.0, 0.0, 0.5, 1.0), "a cat"),
    Region((0.5, 0.0, 1.0, 1.0), "dog and a small cat", negative="fog"),
]


class Backwards(ClassifierFreeGuidance):
    """The negative prompt's estimate before the prompt's."""

    def prepare_inputs(self, data: dict) -> list:
        return super().prepare_inputs(data)[::-1]


class Thrice(Backwards):
    """A second estimate of the prompt between the two, which counts for nothing."""

    def prepare_inputs(self, data: dict) -> list:
        last, first = super().prepare_inputs(data)
        return [last, self._prepare_batch(data, 0, "pred_cond_skip"), first]

    def forward(self, pred_cond_skip: Tensor, **estimates: Tensor) -> object:
        return super().forward(**estimates)

    @property
    def num_conditions(self) -> int:
        return 3


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wan's wants a package of its own, which leaves these prompts as they are; images are small.

    Those to edit have the pixels that `images.shrink` gives them in other pipelines.
    """
    from diffusers.modular_pipelines.qwenimage import encoders as qwen
    from diffusers.modular_pipelines.wan import encoders as wan

    fixed = types.SimpleNamespace(fix_text=lambda text: text)
    monkeypatch.setattr(wan, "ftfy", fixed, raising=False)
    monkeypatch.setattr(qwen, "calculate_dimensions", lambda *_: (48, 32, None))


@contextmanager
def guided(guider: object) -> Iterator[object]:
    """The modular pipeline of Stable Diffusion XL with a guider."""
    pipe = modular("sdxl")
    before = pipe.guider
    pipe.update_components(guider=guider)
    try:
        yield pipe
    finally:
        pipe.update_components(guider=before)


@pytest.mark.parametrize(
    "name",
    ["sdxl", "flux", *(pytest.param(name, marks=pytest.mark.full) for name in list(KINDS)[2:])],
)
def test_whole_runs_equal_those_of_other_pipelines(name: str) -> None:
    pipe, plain = modular(name), ours(name)
    with apply_layout(pipe, PROMPT, REGIONS):
        result = ours(name)
    with apply_layout(classic(name), PROMPT, REGIONS):
        assert close(result, theirs(name))
    assert not close(result, plain)
    with apply_layout(pipe, PROMPT, REGIONS, backend="reference"):
        assert close(result, ours(name))
    with apply_layout(pipe, PROMPT, REGIONS, cross_weight=0, self_weight=0):
        assert torch.equal(ours(name), plain)
    assert torch.equal(ours(name), plain)


@pytest.mark.parametrize(
    "name",
    ["sdxl", *(pytest.param(name, marks=pytest.mark.full) for name in TAKES_REGIONS)],
)
def test_prompts_of_regions_equal_those_of_other_pipelines(name: str) -> None:
    plain = ours(name)
    with apply_layout(modular(name), PROMPT, PROMPTS):
        result = ours(name)
    with apply_layout(classic(name), PROMPT, PROMPTS):
        assert close(result, theirs(name))
    assert not close(result, plain)
    assert torch.equal(ours(name), plain)


def test_prompts_of_regions_leave_other_estimates_alone() -> None:
    """The negative prompt's has the region's negative one, and what is between them nothing."""
    seen: list[Tensor] = []
    handle = pipeline("sdxl").unet.register_forward_hook(
        lambda _module, _args, out: seen.append(out[0])
    )
    try:
        with guided(Thrice(7.5)) as pipe:
            ours("sdxl", steps=1)
            with apply_layout(pipe, PROMPT, PROMPTS):
                ours("sdxl", steps=1)
    finally:
        handle.remove()
    same = [torch.equal(plain, result) for plain, result in zip(seen[:3], seen[3:])]
    assert same == [False, True, False]


@pytest.mark.parametrize("kind", [pytest.param(Backwards, marks=pytest.mark.full), Thrice])
def test_the_prompts_estimate_alone_whatever_the_order(kind: type, calls: list) -> None:
    """The modulated layers and the latents are those of a guider that asks for it first."""
    with apply_layout(modular("sdxl"), PROMPT, REGIONS):
        right = ours("sdxl")
    count = len(calls)
    with guided(kind(7.5)) as pipe:
        plain = ours("sdxl")
        with apply_layout(pipe, PROMPT, REGIONS):
            result = ours("sdxl")
    assert len(calls) == 2 * count > 0
    assert close(result, right)
    assert not close(result, plain)


@pytest.mark.parametrize("skipped", ["skip_attention", "skip_attention_scores"])
def test_estimates_of_layers_left_out_are_left_alone(skipped: str) -> None:
    """Guiders that skip attention look for its processors' classes."""
    config = {"skip_attention": False, "skip_ff": False, skipped: True}
    layers = LayerSkipConfig([0], "mid_block.attentions.0.transformer_blocks", **config)
    with guided(SkipLayerGuidance(7.5, 2.0, 0.0, 1.0, skip_layer_config=layers)) as pipe:
        plain = ours("sdxl")
        with apply_layout(pipe, PROMPT, REGIONS):
            assert not close(ours("sdxl"), plain)
        with apply_layout(pipe, PROMPT, REGIONS, cross_weight=0, self_weight=0):
            assert torch.equal(ours("sdxl"), plain)


def test_estimates_of_the_negative_prompt_are_left_alone() -> None:
    seen: list[Tensor] = []
    unet = pipeline("sdxl").unet
    handle = unet.register_forward_hook(lambda _module, _args, out: seen.append(out[0]))
    try:
        with guided(Thrice(7.5)) as pipe:
            ours("sdxl", steps=1)
            with apply_layout(pipe, PROMPT, REGIONS):
                ours("sdxl", steps=1)
    finally:
        handle.remove()
    same = [torch.equal(plain, result) for plain, result in zip(seen[:3], seen[3:])]
    assert same == [True, True, False]


def test_a_layout_with_semantic_guidance() -> None:
    """The prompt's estimate is laid out, and those of concepts are not, as on other pipelines."""
    pipe, edits = pipeline("sdxl"), [Edit("fog", scale=4, warmup=1)]
    with apply_layout(pipe, PROMPT, REGIONS), semantic_guidance(pipe, edits):
        right = latents(pipe, steps=4, guidance_scale=7.5)
    with guided(semantic_guider(modular("sdxl"), edits, 7.5)) as same:
        plain = ours("sdxl")
        with apply_layout(same, PROMPT, REGIONS):
            result = ours("sdxl")
    assert close(result, right)
    assert not close(plain, right)


def test_without_guidance_every_call_is_the_prompts(calls: list) -> None:
    with guided(ClassifierFreeGuidance(1.0)) as pipe, apply_layout(pipe, PROMPT, REGIONS):
        ours("sdxl", steps=1)
    assert len(calls) == len(pipe.unet.attn_processors)


def test_a_batch_and_several_images_of_a_prompt(calls: list) -> None:
    """Every prompt has its layout, every image of it too."""
    prompts, regions = ["a cat", "a dog"], [[REGIONS[0]], [REGIONS[1]]]
    with apply_layout(modular("sdxl"), prompts, regions):
        ours("sdxl", prompts, steps=1, num_images_per_prompt=2)
    words = next(call[4] for call in calls if call[1].shape[2] == 16)  # of the text
    assert [row.max().item() for row in words] == [1, 1, 1, 1]
    cats, dogs = words[:2], words[2:]
    assert torch.equal(cats[0], cats[1])
    assert torch.equal(dogs[0], dogs[1])
    queries = next(call[3] for call in calls if call[1].shape[2] == 16)
    assert not torch.equal(queries[0], queries[2])


def test_blocks_may_end_in_any_order() -> None:
    pipe = modular("sdxl")
    guider, step = pipe.guider, pipe._blocks.sub_blocks["text_encoder"]
    before = set(vars(guider)), set(vars(step))
    plain, stacks = ours("sdxl"), [ExitStack(), ExitStack()]
    for stack in stacks:
        stack.enter_context(apply_layout(pipe, PROMPT, REGIONS))
    both = ours("sdxl")
    stacks[0].close()
    assert torch.equal(ours("sdxl"), both)
    assert not close(both, plain)
    stacks[1].close()
    assert (set(vars(guider)), set(vars(step))) == before
    assert torch.equal(ours("sdxl"), plain)


@pytest.mark.parametrize("name", ["sdxl", "qwen"])
def test_another_prompt_is_told_of(name: str) -> None:
    """Where a block has a method that encodes, and where its module has a function."""
    encoder = viewed(modular(name)).encoder
    before = getattr(encoder.holder, encoder.name)
    with (
        apply_layout(modular(name), PROMPT, REGIONS),
        pytest.warns(UserWarning, match="the call's prompt 'a fog dog' is not the layout's 'a c"),
    ):
        ours(name, "a fog dog", steps=1)
    assert getattr(encoder.holder, encoder.name) is before


def test_calls_of_another_pipeline_are_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pipelines that share a module's function."""
    pipe, told = modular("sd3"), []
    monkeypatch.setattr(Reading, "hear", lambda _reading, given: told.append(given["prompt"]))
    other = types.SimpleNamespace(**pipe.components, _execution_device=torch.device("cpu"))
    with apply_layout(pipe, PROMPT, REGIONS):
        viewed(pipe).encoder.holder.encode_prompt(other, "a fog dog")
        ours("sd3", steps=1)
    assert told == [PROMPT]


def test_what_is_not_followed_is_refused() -> None:
    pipe = modular("sdxl")
    rule = "keep its guider inside of the block, got another Backwards"
    with (
        apply_layout(pipe, PROMPT, REGIONS),
        guided(Backwards(7.5)),
        pytest.raises(ValueError, match=f"^pipe must {rule}"),
    ):
        ours("sdxl")
    rule = "prepare its guider before each call of its denoiser, got call 0 of 0"
    with apply_layout(pipe, PROMPT, REGIONS), pytest.raises(ValueError, match=f"^pipe must {rule}"):
        ask(pipe.unet)
    other = modular_pipelines.Flux2AutoBlocks().init_pipeline()
    rule = "have one block that calls one of encode_prompt, .*, got Flux2ModularPipeline with 0"
    with (
        pytest.raises(ValueError, match=f"^pipe must {rule}"),
        apply_layout(other, PROMPT, REGIONS),
    ):
        pytest.fail("the block must not run")
    other = modular_pipelines.Wan22Blocks().init_pipeline()
    with (
        pytest.raises(ValueError, match=r"^pipe must have one guider, got WanModularPipeline"),
        apply_layout(other, PROMPT, REGIONS),
    ):
        pytest.fail("the block must not run")


def ask(unet: torch.nn.Module) -> None:
    """A call of Stable Diffusion XL's network that no guider knows of."""
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    unet(
        torch.zeros(1, config.in_channels, 8, 12),
        1.0,
        encoder_hidden_states=torch.zeros(1, 16, config.cross_attention_dim),
        added_cond_kwargs={"text_embeds": torch.zeros(1, pooled), "time_ids": torch.zeros(1, 6)},
    )
