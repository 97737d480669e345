"""Concepts of U-Nets in calls of their own, beside concepts in one batch."""

from __future__ import annotations

import pytest
import torch
from pipelines import PROMPT, REGIONS, close, latents, pipeline

from dense_attn.integrations.diffusers import Edit, apply_layout, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = [Edit("fog", warmup=1, threshold=0.5), Edit("a long bank of snow", warmup=0, reverse=True)]
NOISE = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model", ["sd", pytest.param("sdxl", marks=pytest.mark.full)])
def test_a_call_each_is_the_batch(model: str) -> None:
    """Two prompts with two images in all, a layout in either order, and no more rows a call."""
    pipe, counts = pipeline(model), []
    given = {"prompt": ["a cat", "a dog"], "latents": NOISE, "steps": 3}
    plain = latents(pipe, **given)
    with semantic_guidance(pipe, EDITS):
        batched = latents(pipe, **given)
        with apply_layout(pipe, PROMPT, REGIONS):
            laid = latents(pipe, steps=4)
    handle = pipe.unet.conv_in.register_forward_hook(lambda *args: counts.append(len(args[2])))
    with semantic_guidance(pipe, EDITS, batch_concepts=False):
        apart = latents(pipe, **given)
        handle.remove()
        assert torch.equal(latents(pipe, **given), apart)
        with apply_layout(pipe, PROMPT, REGIONS):
            assert close(latents(pipe, steps=4), laid)
    with apply_layout(pipe, PROMPT, REGIONS), semantic_guidance(pipe, EDITS, batch_concepts=False):
        assert close(latents(pipe, steps=4), laid)
    assert close(apart, batched)
    assert not close(apart, plain)
    assert counts == [4, 2, 2] * 3
    assert torch.equal(latents(pipe, **given), plain)


def test_vectors_need_no_call() -> None:
    """The vectors of concepts by themselves are the batch's, and add to a run of no concepts."""
    pipe = pipeline("sd")
    plain = latents(pipe, steps=3)
    with semantic_guidance(pipe, EDITS, batch_concepts=False) as guidance:
        vectors = guidance.record()
        guided = latents(pipe, steps=3)
    with semantic_guidance(pipe, apply=vectors, batch_concepts=False):
        assert close(latents(pipe, steps=3), guided)
    with semantic_guidance(pipe, [Edit("fog", scale=0.0, warmup=0)], batch_concepts=False):
        assert torch.equal(latents(pipe, steps=3), plain)
    assert not close(guided, plain)
