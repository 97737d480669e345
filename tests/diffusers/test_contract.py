"""Pipelines inside of the blocks, and after them."""

from __future__ import annotations

import threading

import pytest
import torch
import torch._dynamo.testing
from pipelines import (
    MODELS,
    PROMPT,
    REGIONS,
    close,
    diffusers,
    latents,
    pipeline,
    state_of,
)

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import (
    Edit,
    apply_layout,
    semantic_guidance,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model", MODELS)
def test_everything_is_restored(model: str) -> None:
    pipe = pipeline(model)
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


@pytest.mark.full  # regional compilation and region prompts compile less
@pytest.mark.parametrize("way", ["module", "in-place"])
def test_torch_compile(way: str) -> None:
    """A compiled U-Net takes layouts and concepts in one graph, and needs one without."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    with apply_layout(pipe, PROMPT, REGIONS):
        right = latents(pipe)
    with semantic_guidance(pipe, [Edit("fog", warmup=1)]), apply_layout(pipe, PROMPT, REGIONS):
        guided = latents(pipe)
    moved = [("dog", (0.0, 0.5, 1.0, 1.0)), ("cat", (0.5, 0.0, 1.0, 0.5))]
    with apply_layout(pipe, PROMPT, moved):
        elsewhere = latents(pipe)
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
    with apply_layout(pipe, PROMPT, moved):
        assert close(latents(pipe), elsewhere)
    assert not close(elsewhere, right)
    assert counter.frame_count == graphs
    assert close(latents(pipe), plain)
    with semantic_guidance(pipe, [Edit("fog", warmup=1)]), apply_layout(pipe, PROMPT, REGIONS):
        assert close(latents(pipe), guided)


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
