"""Guidance vectors of a pipeline's run, added to another run of the same noise."""

from __future__ import annotations

import pytest
import torch
from pipelines import close, latents, pipeline

from dense_attn.integrations.diffusers import Edit, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")
EDITS = [Edit("fog", warmup=1), Edit("snow", warmup=3, reverse=True)]


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_same_run_gets_its_bits_without_a_concept(model: str) -> None:
    pipe, calls = pipeline(model), []
    given = {"steps": 5, "num_images_per_prompt": 2}
    with semantic_guidance(pipe, EDITS) as guidance:
        guided = latents(pipe, **given)
        vectors = guidance.record()
        assert torch.equal(latents(pipe, **given), guided)
        latents(pipe, "a dog", **given)  # is not recorded
    assert [step for step, _ in vectors] == [0, 1, 2, 3, 4]
    handle = pipe.unet.register_forward_pre_hook(lambda _unet, args: calls.append(len(args[0])))
    with semantic_guidance(pipe, apply=vectors):
        again = latents(pipe, **given)
        other = latents(pipe, "a dog", **given)
    handle.remove()
    assert close(again, guided)  # a batch of another size may round otherwise
    assert set(calls) == {4}  # no estimate of a concept
    assert not close(other, latents(pipe, "a dog", **given))
    with semantic_guidance(pipe, [Edit("fog", scale=0.0, warmup=0)], apply=vectors):
        assert close(latents(pipe, **given), guided)


def test_vectors_of_a_run_of_other_steps_are_refused() -> None:
    pipe = pipeline("sd")
    with semantic_guidance(pipe, EDITS) as guidance:
        vectors = guidance.record()
        latents(pipe, steps=4)
    rule = "apply must be of a run of as many steps, 6, got 4"
    with semantic_guidance(pipe, apply=vectors), pytest.raises(ValueError, match=rule):
        latents(pipe, steps=6)
    with pytest.raises(TypeError, match="edits must be a list of Edit"):
        semantic_guidance(pipe).__enter__()
    with pytest.raises(TypeError, match="apply must be the list that record"):
        semantic_guidance(pipe, apply=3).__enter__()
