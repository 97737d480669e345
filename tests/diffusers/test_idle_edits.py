"""Edits that can do nothing are warned of, at the `with` line or where a run's length is known."""

from __future__ import annotations

import warnings

import pytest
import torch
from pipelines import diffusers, latents, pipeline

from dense_attn.examples._tiny_pipeline import tiny_modular_pipeline
from dense_attn.integrations.diffusers import Edit, semantic_guidance, semantic_guider

LATE = (
    "edits[1].warmup must be at most {}, the last of the run's {} steps, for the concept to "
    "act, got {}"
)
NOISE = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def warned(call: object) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(one.message) for one in caught if str(one.message).startswith("edits[")]


@pytest.mark.parametrize(
    ("warmup", "steps", "late"), [(4, 4, True), (3, 4, False), (2.5, 3, True), (10, 8, True)]
)
def test_a_concept_that_begins_after_the_run_is_told_once(
    warmup: float, steps: int, late: bool
) -> None:
    pipe, edits = pipeline("sd"), [Edit("fog", warmup=0), Edit("snow", warmup=warmup)]

    def runs() -> None:
        with semantic_guidance(pipe, edits):
            for _ in range(2):
                latents(pipe, steps=steps)

    assert warned(runs) == ([LATE.format(steps - 1, steps, warmup)] if late else [])


@pytest.mark.parametrize("guider", [False, True])
def test_a_shorter_run_after_a_long_one_is_told_of_too(guider: bool) -> None:
    pipe, edits = (
        tiny_modular_pipeline() if guider else pipeline("sd"),
        [Edit("fog", warmup=3), Edit("snow", warmup=4)],
    )

    def runs() -> None:
        if guider:
            pipe.update_components(guider=semantic_guider(pipe, edits))
            for steps in (5, 4, 3, 2):
                pipe(
                    prompt="a face",
                    num_inference_steps=steps,
                    height=16,
                    width=16,
                    output="latents",
                )
            return
        with semantic_guidance(pipe, edits):
            for steps in (5, 4, 3, 2):
                latents(pipe, steps=steps)

    assert warned(runs) == [LATE.format(3, 4, 4), LATE.format(2, 3, 3).replace("[1]", "[0]")]


def test_a_late_concept_does_nothing_indeed() -> None:
    pipe, given = pipeline("sd"), {"height": 16, "width": 16, "steps": 4}
    plain = latents(pipe, "a castle", **given)
    with (
        semantic_guidance(pipe, [Edit("fog", warmup=4)]),
        pytest.warns(UserWarning, match="at most 3, the last"),
    ):
        assert torch.equal(latents(pipe, "a castle", **given), plain)
    with semantic_guidance(pipe, [Edit("fog", warmup=3)]):
        assert not torch.equal(latents(pipe, "a castle", **given), plain)


def test_the_steps_are_those_of_the_run_not_of_the_schedule() -> None:
    pipe = pipeline("sd")
    from_image = diffusers.StableDiffusionImg2ImgPipeline(
        **pipe.components, requires_safety_checker=False
    )
    from_image.set_progress_bar_config(disable=True)

    def run() -> None:
        with semantic_guidance(from_image, [Edit("fog", warmup=0), Edit("snow", warmup=6)]):
            from_image(
                "a castle",
                torch.rand(1, 3, 16, 16),
                strength=0.5,
                num_inference_steps=10,
                output_type="latent",
            )

    assert warned(run) == [LATE.format(4, 5, 6)]


def test_a_guider_tells_it_too() -> None:
    pipe = tiny_modular_pipeline()

    def run() -> None:
        pipe.update_components(
            guider=semantic_guider(pipe, [Edit("fog", warmup=0), Edit("snow", warmup=3)])
        )
        for _ in range(2):
            pipe(prompt="a face", num_inference_steps=3, height=16, width=16, output="latents")

    assert warned(run) == [LATE.format(2, 3, 3)]


@pytest.mark.parametrize("guider", [False, True])
def test_what_can_act_in_no_run_is_told_at_once(guider: bool) -> None:
    pipe = tiny_modular_pipeline() if guider else pipeline("sd")
    edits = [
        Edit("fog", warmup=5, cooldown=5),
        Edit("snow", warmup=0, cooldown=0),
        Edit("rain", weight=-1.0),
        Edit("sun", warmup=5, cooldown=6),
        Edit("moon", weight=0.0, scale=0.0),  # turned off on purpose
    ]

    def begin() -> None:
        if guider:
            semantic_guider(pipe, edits)
        else:
            with semantic_guidance(pipe, edits):
                pass

    with pytest.warns(UserWarning, match=r"edits\[") as caught:
        begin()
    assert [str(one.message) for one in caught] == [
        "edits[0].cooldown must be above its warmup of 5 for the concept to act, got 5",
        "edits[1].cooldown must be above its warmup of 0 for the concept to act, got 0",
        (
            "edits[2].weight must be above 0 for the concept to act (reverse=True turns away "
            "from it), got -1.0"
        ),
    ]
    assert {one.filename for one in caught} == {__file__}
