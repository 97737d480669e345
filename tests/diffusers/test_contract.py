"""What a pipeline is like inside of the blocks and after them, and what is refused before anything
is touched.
"""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from pipelines import FAMILIES, PROMPT, REGIONS, close, diffusers, latents, pipeline

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import (
    Edit,
    apply_layout,
    invert,
    optimize,
    reconstruct,
    semantic_guidance,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def denoiser_of(pipe: object) -> torch.nn.Module:
    return getattr(pipe, "unet", None) or pipe.transformer


def state_of(pipe: object) -> tuple:
    """Processors by identity, hooks, and what lies in the denoiser's own dictionary."""
    denoiser = denoiser_of(pipe)
    processors = {name: id(processor) for name, processor in denoiser.attn_processors.items()}
    hooks = len(denoiser._forward_pre_hooks), len(denoiser._forward_hooks)
    return processors, hooks, set(denoiser.__dict__), set(pipe.scheduler.__dict__)


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_is_restored(family: str) -> None:
    pipe = pipeline(family)
    plain, before = latents(pipe), state_of(pipe)
    with apply_layout(pipe, PROMPT, REGIONS):
        assert state_of(pipe) != before
        latents(pipe)
    assert state_of(pipe) == before
    with pytest.raises(ZeroDivisionError), apply_layout(pipe, PROMPT, REGIONS):
        raise ZeroDivisionError
    assert state_of(pipe) == before
    assert torch.equal(latents(pipe), plain)


def test_an_exception_in_the_middle_of_a_run() -> None:
    """The next run inside of the block begins anew."""
    pipe = pipeline("sd")

    def stop(_pipe: object, step: int, _t: object, given: dict) -> dict:
        if step == 1:
            raise KeyboardInterrupt
        return given

    with apply_layout(pipe, PROMPT, REGIONS):
        right = latents(pipe)
        with pytest.raises(KeyboardInterrupt):
            latents(pipe, callback_on_step_end=stop)
        assert torch.equal(latents(pipe), right)


def test_blocks_inside_of_blocks() -> None:
    """The innermost counts, and the outer one goes on after it."""
    pipe, other = pipeline("sd"), [("dog", REGIONS[0][1])]
    alone = []
    for regions in (REGIONS, other):
        with apply_layout(pipe, PROMPT, regions):
            alone.append(latents(pipe))
    before = state_of(pipe)
    with apply_layout(pipe, PROMPT, REGIONS):
        with apply_layout(pipe, PROMPT, other):
            assert torch.equal(latents(pipe), alone[1])
        assert torch.equal(latents(pipe), alone[0])
    assert state_of(pipe) == before


def test_two_pipelines_at_once_and_threads() -> None:
    first, second = (tiny_pipeline(diffusers.StableDiffusionPipeline, seed=seed) for seed in (0, 1))
    layouts = {id(first): REGIONS, id(second): [("dog", (0.0, 0.5, 1.0, 1.0))]}
    alone = {}
    for pipe in (first, second):
        with apply_layout(pipe, PROMPT, layouts[id(pipe)]):
            alone[id(pipe)] = latents(pipe)
    with (
        apply_layout(first, PROMPT, layouts[id(first)]),
        apply_layout(second, PROMPT, layouts[id(second)]),
    ):
        for pipe in (second, first):
            assert torch.equal(latents(pipe), alone[id(pipe)])
    found = {}

    def run(pipe: object) -> None:
        with apply_layout(pipe, PROMPT, layouts[id(pipe)]):
            found[id(pipe)] = latents(pipe)

    threads = [threading.Thread(target=run, args=(pipe,)) for pipe in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[key], alone[key]) for key in alone)


def test_embeddings_of_the_callers_own() -> None:
    """prompt_embeds in the prompt's place: its tokens are where the prompt says."""
    pipe = pipeline("sd")
    text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    with apply_layout(pipe, PROMPT, REGIONS):
        by_words = latents(pipe)
        assert torch.equal(
            latents(pipe, None, prompt_embeds=text, negative_prompt_embeds=empty), by_words
        )
        assert not torch.equal(latents(pipe, negative_prompt="fog"), by_words)


@pytest.mark.parametrize("way", ["module", pytest.param("in-place", marks=pytest.mark.full)])
def test_torch_compile(way: str) -> None:
    """A compiled U-Net takes layouts and concepts, and needs no more than a graph with them and one
    without.
    """
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    with apply_layout(pipe, PROMPT, REGIONS):
        right = latents(pipe)
    with semantic_guidance(pipe, [Edit("fog", warmup=1)]), apply_layout(pipe, PROMPT, REGIONS):
        guided = latents(pipe)
    plain = latents(pipe)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    if way == "module":
        pipe.unet = torch.compile(pipe.unet, backend=counter, fullgraph=True)
    else:
        pipe.unet.compile(backend=counter, fullgraph=True)
    with apply_layout(pipe, PROMPT, REGIONS):
        assert close(latents(pipe), right)
        graphs = counter.frame_count
        latents(pipe)
        assert counter.frame_count == graphs <= 2
    assert close(latents(pipe), plain)
    with semantic_guidance(pipe, [Edit("fog", warmup=1)]), apply_layout(pipe, PROMPT, REGIONS):
        assert close(latents(pipe), guided)


MASK = np.ones((8, 8), bool)


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"regions": [("bird", MASK)]}, ValueError, r"\[0\] must have a phrase of the prompt 'a cat dog', got 'bird'"),
        ({"regions": [("", MASK)]}, ValueError, r"regions\[0\] must have a phrase of at least one token, got ''"),
        ({"regions": [("cat", MASK), ("dog", ~MASK)]}, ValueError, r"\[1\] must have a mask of at least one pixel"),
        ({"regions": [("cat", MASK), ("dog", MASK[1:])]}, ValueError, r"\[1\] must have a mask of the size \(8, 8\)"),
        ({"regions": [("cat", MASK)] * 33}, ValueError, "regions must hold 1 to 32 regions, got 33"),
        ({"regions": [("cat", MASK.astype(float))]}, TypeError, r"\[0\] must have a bool mask, .* ndarray of float64"),
        ({"regions": [("cat", MASK[0])]}, ValueError, r"regions\[0\] must have a mask of 2 dimensions"),
        ({"regions": [("cat", (0.0, 0.0, 2.0, 1.0))]}, ValueError, r"the box of regions\[0\] must have 0 <= x0"),
        ({"regions": [("cat", "left")]}, TypeError, r"regions\[0\] must have a bool mask"),
        ({"regions": []}, TypeError, "regions must be a list of"),
        ({"regions": "cat"}, TypeError, "regions must be a list of"),
        ({"regions": [[("cat", MASK)], [("dog", MASK)]]}, ValueError, "regions must hold one list for each of the 1"),
        ({"regions": [("cat", MASK), "dog"]}, TypeError, r"regions\[1\] must be a pair \(phrase, mask\)"),
        ({"prompt": 3}, TypeError, "prompt must be a string or a list of strings, got 3"),
        ({"prompt": []}, TypeError, "prompt must be a string or a list of strings"),
        ({"active": 1.5}, ValueError, "active must be from 0 to 1, got 1.5"),
        ({"exponent": -1}, ValueError, "exponent must be at least 0, got -1"),
        ({"self_weight": float("nan")}, ValueError, "self_weight must be finite"),
        ({"modulation": "min"}, ValueError, "modulation must be one of range, max, bias, mask, got 'min'"),
        ({"encode_phrases": 1}, TypeError, "encode_phrases must be a bool"),
        ({"backend": "gpu"}, ValueError, "backend must be one of"),
    ],
)  # fmt: skip
def test_wrong_layouts_are_refused(arguments: dict, kind: type, sentence: str) -> None:
    pipe = pipeline("sd")
    before = state_of(pipe)
    given = {"prompt": PROMPT, "regions": REGIONS} | arguments
    with pytest.raises(kind, match=sentence), apply_layout(pipe, **given):
        pytest.fail("the block must not run")
    assert state_of(pipe) == before


def refused_layout(pipe: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence), apply_layout(pipe, PROMPT, REGIONS):
        pytest.fail("the block must not run")


def test_pipelines_that_are_not_known_are_refused() -> None:
    refused_layout(object(), "pipe must have a UNet2DConditionModel, .*, got object")
    with pytest.raises(ValueError, match="pipe must have a UNet2DConditionModel, got FluxPipeline"):
        semantic_guidance(pipeline("flux"), [Edit("fog")]).__enter__()
    for call in (
        lambda pipe: invert(pipe, torch.rand(1, 3, 16, 16), "a"),
        lambda pipe: optimize(pipe, "a", torch.sum),
    ):
        with pytest.raises(
            ValueError,
            match="pipe must be of Stable Diffusion 1 or 2, got StableDiffusionXLPipeline",
        ):
            call(pipeline("sdxl"))
    with pytest.raises(TypeError, match="inversion must be what invert returns, got Tensor"):
        reconstruct(pipeline("sd"), torch.zeros(1))


def test_processors_of_another_extension_are_refused() -> None:
    class AttnProcessor2_0:
        def __call__(
            self, attn: object, hidden_states: torch.Tensor, *_: object, **__: object
        ) -> torch.Tensor:
            return hidden_states

    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    before = state_of(pipe)
    refused_layout(pipe, "pipe must have attention processors of .*, got AttnProcessor2_0 in down")
    assert state_of(pipe) == before


def test_ip_adapter_is_refused_with_the_reason() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    processors = dict(pipe.unet.attn_processors)
    name = next(name for name in processors if "attn2" in name)
    processors[name] = IPAdapterAttnProcessor2_0(16, 16)
    pipe.unet.set_attn_processor(processors)
    refused_layout(
        pipe, "IPAdapterAttnProcessor2_0 in .*: IP-Adapter's image attention has no layout"
    )


def test_pipelines_of_other_batches_are_refused() -> None:
    """What guides by more than two halves, or does not say whether it guides."""
    parts = tiny_pipeline(diffusers.StableDiffusionPipeline).components
    wrong = {
        "StableDiffusionPAGPipeline": "make no estimates beside the prompt's .* .do_perturbed_attention_guidance.",
        "StableDiffusionInstructPix2PixPipeline": "pipe must (have an encode_prompt|make no estimates|tell whether)",
        "SemanticStableDiffusionPipeline": "pipe must have an encode_prompt of a prompt",
        "StableDiffusionUpscalePipeline": "tell whether it guides .do_classifier_free_guidance., got StableDiffusionUp",
    }
    for name, sentence in wrong.items():
        pipe = getattr(diffusers, name).__new__(getattr(diffusers, name))
        pipe.__dict__.update(parts)
        before = state_of(pipe)
        refused_layout(pipe, sentence)
        with pytest.raises(ValueError, match=sentence):
            semantic_guidance(pipe, [Edit("fog")]).__enter__()
        assert state_of(pipe) == before


def test_processors_replaced_inside_of_a_block() -> None:
    """The next call says so; afterwards they stay, and those of the block have no effect."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    plain, kept = latents(pipe), None
    with apply_layout(pipe, PROMPT, REGIONS, active=1.0):
        latents(pipe)
        kept = pipe.unet.attn_processors
        pipe.enable_attention_slicing(1)
        with pytest.raises(
            ValueError,
            match="keep the layout's attention processors inside of the block, got Sliced",
        ):
            latents(pipe)
    assert {type(processor).__name__ for processor in pipe.unet.attn_processors.values()} == {
        "SlicedAttnProcessor"
    }
    pipe.unet.set_attn_processor(kept)
    assert torch.equal(latents(pipe), plain)


def test_blocks_that_end_in_another_order() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    before, plain = state_of(pipe), latents(pipe)
    outer, inner = (apply_layout(pipe, PROMPT, REGIONS, active=1.0) for _ in range(2))
    outer.__enter__()
    inner.__enter__()
    latents(pipe)
    outer.__exit__(None, None, None)
    assert not close(latents(pipe), plain)
    inner.__exit__(None, None, None)
    assert state_of(pipe) == before
    assert torch.equal(latents(pipe), plain)


def test_calls_that_do_not_fit_the_layout() -> None:
    """Refused inside of the call, and the pipeline is whole afterwards."""
    pipe = pipeline("sd")
    before = state_of(pipe)
    sentence = "prompt must have one entry or one for each prompt of the call, got 2 for 3"
    with pytest.raises(ValueError, match=sentence), apply_layout(pipe, [PROMPT] * 2, [REGIONS] * 2):
        latents(pipe, [PROMPT] * 3)
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    ("edits", "kind", "sentence"),
    [
        ([], TypeError, "edits must be a list of Edit"),
        (Edit("fog"), TypeError, "edits must be a list of Edit"),
        (["fog"], TypeError, r"edits\[0\] must be an Edit, got str"),
        ([Edit(3)], TypeError, r"edits\[0\].prompt must be a string, got int"),
        ([Edit("fog", threshold=2.0)], ValueError, "edit_threshold"),
        ([Edit("fog", warmup=-1)], ValueError, "edit_warmup_steps"),
    ],
)
def test_wrong_edits_are_refused(edits: object, kind: type, sentence: str) -> None:
    pipe = pipeline("sd")
    before = state_of(pipe)
    with pytest.raises(kind, match=sentence), semantic_guidance(pipe, edits):
        pytest.fail("the block must not run")
    assert state_of(pipe) == before


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        ({"guidance_scale": 1.0}, "guidance_scale must be above 1 for semantic guidance, got 1.0"),
        ({"guidance_rescale": 0.5}, "guidance_rescale must be 0 with semantic guidance, got 0.5"),
    ],
)
def test_calls_that_semantic_guidance_cannot_guide(call: dict, sentence: str) -> None:
    pipe = pipeline("sd")
    before = state_of(pipe)
    with pytest.raises(ValueError, match=sentence), semantic_guidance(pipe, [Edit("fog")]):
        latents(pipe, **call)
    assert state_of(pipe) == before
