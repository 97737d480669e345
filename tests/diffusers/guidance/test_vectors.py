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


@pytest.mark.parametrize("model", ["sd", "sd3"])
def test_a_run_that_breaks_off_is_not_kept_and_the_next_is(model: str) -> None:
    pipe = pipeline(model)

    def stop(_pipe: object, step: int, *_: object) -> dict:
        if step == 2:
            raise KeyboardInterrupt
        return {}

    with semantic_guidance(pipe, EDITS) as guidance:
        guided = latents(pipe, steps=5)
        vectors = guidance.record()
        with pytest.raises(KeyboardInterrupt):
            latents(pipe, steps=5, callback_on_step_end=stop)
        assert [step for step, _ in vectors] == [0, 1, 2]
        assert torch.equal(latents(pipe, steps=5), guided)
        latents(pipe, "a dog", steps=4)  # is not recorded
    assert [step for step, _ in vectors] == [0, 1, 2, 3, 4]
    with semantic_guidance(pipe, apply=vectors):
        assert close(latents(pipe, steps=5), guided)


@pytest.mark.parametrize(
    ("edit", "kind", "sentence"),
    [
        (Edit("a", scale=float("nan")), ValueError, r"edits\[1\].scale must be finite, got nan"),
        (Edit("a", scale=[1.0]), TypeError, r"edits\[1\].scale must be a number, got list"),
        (Edit("a", threshold=2), ValueError, r"edits\[1\].threshold must be from 0 to 1, got 2"),
        (Edit("a", warmup=-1), ValueError, r"edits\[1\].warmup must be at least 0, got -1"),
        (Edit("a", cooldown="b"), TypeError, r"edits\[1\].cooldown must be a number, got str"),
        (Edit("a", weight=None), TypeError, r"edits\[1\].weight must be a number, got NoneType"),
        (Edit("a", reverse=1), TypeError, r"edits\[1\].reverse must be a bool, got int"),
    ],
    ids=lambda value: getattr(value, "prompt", ""),
)
def test_a_refused_concept_is_named_as_the_user_has_it(
    edit: Edit, kind: type, sentence: str
) -> None:
    pipe = pipeline("sd")
    with pytest.raises(kind, match=sentence):
        semantic_guidance(pipe, [EDITS[0], edit]).__enter__()
    with pytest.raises(TypeError, match="momentum_scale must be a number, got str"):
        semantic_guidance(pipe, EDITS, momentum_scale="a").__enter__()
    with pytest.raises(ValueError, match="momentum_beta must be finite, got inf"):
        semantic_guidance(pipe, EDITS, momentum_beta=float("inf")).__enter__()


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
