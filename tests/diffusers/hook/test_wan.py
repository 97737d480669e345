"""Wan pipelines with timesteps of each token, and prompts that they clean."""

from __future__ import annotations

import pytest
import torch
from families import classes, family, run
from pipelines import PROMPT, REGIONS, close, diffusers
from torch import Tensor

from dense_attn.integrations.diffusers import apply_layout
from dense_attn.integrations.diffusers.state import LayoutState

pytestmark = pytest.mark.usefixtures("one_thread")
BOX = (0.0, 0.0, 0.5, 1.0)


def test_timesteps_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first frame's tokens are at 0 where a video begins with an image: others count."""
    pipe = classes.made(diffusers.WanImageToVideoPipeline)
    pipe.transformer = family("wan").transformer
    pipe.register_to_config(expand_timesteps=True)
    times: list[float] = []
    before_call = LayoutState.before_call

    def spy(state: LayoutState, *given: object) -> object:
        out = before_call(state, *given)
        times.append(state.steps.time)
        return out

    def video() -> Tensor:
        return pipe(
            classes.PICTURE,
            PROMPT,
            height=32,
            width=32,
            num_frames=5,
            num_inference_steps=2,
            guidance_scale=1.0,
            max_sequence_length=24,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    plain = video()
    monkeypatch.setattr(LayoutState, "before_call", spy)
    with apply_layout(pipe, PROMPT, REGIONS, active=1.0):
        assert not close(video(), plain)
    sigmas = pipe.scheduler.timesteps / pipe.scheduler.config.num_train_timesteps
    assert times == pytest.approx(sigmas.tolist())
    assert times[0] == pytest.approx(1.0, abs=0.01)


def test_a_prompt_that_is_cleaned_is_refused(calls: list) -> None:
    pipe, prompt = family("wan"), "a cat &amp; dog"
    rule = (
        r"^regions\[0\] must have a phrase of a prompt that the pipeline leaves as it is, got .*a c"
    )
    with pytest.raises(ValueError, match=rule), apply_layout(pipe, prompt, [("dog", BOX)]):
        pytest.fail("the block must not run")
    spaced = "a cat \n dog "
    with apply_layout(pipe, spaced, [("dog", BOX)], exponent=0.0):
        run("wan", spaced, steps=1)
    assert calls
