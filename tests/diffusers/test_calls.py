"""How a network is really called: rows of a batch, calls of a step, tensors changed in place."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from pipelines import PROMPT, REGIONS, close, diffusers, latents, pipeline
from torch import Tensor

from dense_attn import Layout
from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Edit, apply_layout, rows, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def own_loop(
    pipe: object, texts: Tensor, rows: int, *, times: int = 1, copies: int = 1, steps: int = 10
) -> Tensor:
    """A user's sampler: `copies` of `rows` latents in a batch, `times` calls in a step."""
    pipe.scheduler.set_timesteps(steps)
    x = torch.randn(rows, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    for t in pipe.scheduler.timesteps:
        for _ in range(times):
            eps = pipe.unet(torch.cat([x] * copies), t, encoder_hidden_states=texts).sample
        x = pipe.scheduler.step(eps[:rows], t, x).prev_sample
    return x


def fresh(scheduler: str = "DDIM") -> object:
    """A pipeline of its own, which has not been called."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    pipe.scheduler = getattr(diffusers, f"{scheduler}Scheduler").from_config(pipe.scheduler.config)
    return pipe


def test_a_negative_half_that_the_pipeline_does_not_tell_of(calls: list) -> None:
    """Rows of the same latents with other texts, as in a user's loop, or another pipeline's."""
    pipe = fresh()
    text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    sentence = (
        "pipe must tell that it guides .do_classifier_free_guidance., got rows of the same "
        "latents with two texts"
    )
    with apply_layout(pipe, PROMPT, REGIONS):
        own_loop(pipe, text, 1)
    assert len(calls) == 3 * len(pipe.unet.attn_processors)
    calls.clear()
    for order in ([empty, text], [empty, text, empty, text]):
        with apply_layout(pipe, PROMPT, REGIONS), pytest.raises(ValueError, match=sentence):
            own_loop(pipe, torch.cat(order), 1, copies=len(order))
    other = diffusers.StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    with apply_layout(other, PROMPT, REGIONS), pytest.raises(ValueError, match=sentence):
        latents(pipe)
    assert calls == []


def test_two_negative_halves_of_two_layouts() -> None:
    pipe, prompts = fresh(), ["a cat", "dog cat"]
    text, empty = pipe.encode_prompt(prompts, "cpu", 1, True)
    with (
        apply_layout(pipe, prompts, [[REGIONS[0]], [REGIONS[1]]]),
        pytest.raises(ValueError, match="tell that it gui"),
    ):
        own_loop(pipe, torch.cat([empty, text]), 2, copies=2)


@pytest.mark.parametrize("images", [1, 2])
def test_prompts_of_one_seed_are_no_halves(images: int) -> None:
    """Without guidance each has a row and a layout of its own, though the latents are the same."""
    pipe, prompts = pipeline("sd"), ["a cat", "dog cat"]
    regions = [[REGIONS[0]], [REGIONS[1]]]
    noise = torch.randn(images, 4, 8, 12, generator=torch.Generator().manual_seed(1))
    options = {"guidance_scale": 1.0, "num_images_per_prompt": images}
    with apply_layout(pipe, prompts, regions):
        both = latents(pipe, prompts, latents=noise.repeat(2, 1, 1, 1), **options)
    for i, prompt in enumerate(prompts):
        with apply_layout(pipe, prompt, regions[i]):
            assert close(
                both[i * images :][:images], latents(pipe, prompt, latents=noise, **options)
            )


def test_guidance_that_is_no_two_halves(calls: list) -> None:
    """The pipeline says that it guides, and gives the prompt's rows alone."""
    pipe = fresh()
    latents(pipe, steps=1)
    assert pipe.do_classifier_free_guidance
    text = pipe.encode_prompt(PROMPT, "cpu", 2, False)[0]
    sentence = (
        "pipe must call its denoiser with two halves of the same latents when it guides, got "
        "other latents"
    )
    with apply_layout(pipe, PROMPT, REGIONS), pytest.raises(ValueError, match=sentence):
        own_loop(pipe, text, 2)
    with semantic_guidance(pipe, [Edit("fog")]), pytest.raises(ValueError, match=sentence):
        own_loop(pipe, text, 2)
    assert calls == []


def test_guidance_may_end_within_a_run(calls: list) -> None:
    """A callback that turns it off hands in the prompt's half alone."""
    pipe = pipeline("sd")

    def alone(pipe: object, step: int, _t: object, given: dict) -> dict:
        if step == 0:
            pipe._guidance_scale = 1.0
            given["prompt_embeds"] = given["prompt_embeds"].chunk(2)[1]
        return given

    with apply_layout(pipe, PROMPT, REGIONS):
        latents(
            pipe, callback_on_step_end=alone, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        )
    assert len(calls) == 3 * len(pipe.unet.attn_processors)
    assert {call[0].shape[0] for call in calls} == {1}


@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete", "PNDM", "HeunDiscrete"])
def test_a_scheduler_that_is_copied_goes_on(scheduler: str, calls: list) -> None:
    """Timesteps are compared by value; a second run with the same ones begins anew."""
    pipe = fresh(scheduler)

    def replaced(pipe: object, _step: int, _t: object, given: dict) -> dict:
        pipe.scheduler = copy.deepcopy(pipe.scheduler)
        return given

    def broken(pipe: object, step: int, _t: object, given: dict) -> dict:
        if step == 1:
            raise ZeroDivisionError
        return replaced(pipe, step, _t, given)

    with apply_layout(pipe, PROMPT, REGIONS):
        right = latents(pipe)
        expected = len(calls)
        for _ in range(2):
            calls.clear()
            assert torch.equal(latents(pipe, callback_on_step_end=replaced), right)
            assert len(calls) == expected
            with pytest.raises(ZeroDivisionError):
                latents(pipe, callback_on_step_end=broken)
        for _ in range(2):
            calls.clear()
            latents(pipe, steps=4, guidance_scale=1.0)
            assert len(calls) == -(-3 * pipe.num_timesteps // 10) * len(pipe.unet.attn_processors)


@pytest.mark.filterwarnings("ignore:edits.*warmup must be at most")  # fewer steps than that
@pytest.mark.parametrize("scheduler", ["DDIM", "EulerDiscrete"])
def test_several_calls_of_a_step(scheduler: str, calls: list) -> None:
    """They are one step: the layout acts in all of the first 30 %."""
    pipe = fresh(scheduler)
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    with apply_layout(pipe, PROMPT, REGIONS):
        own_loop(pipe, text, 1, times=3)
    layers = len(pipe.unet.attn_processors)
    assert len(calls) == 3 * 3 * layers
    strengths = [float(call[5].max()) for call in calls[::layers]]
    assert strengths == sorted(strengths, reverse=True)
    assert [strengths.count(strength) for strength in strengths] == [3] * 9
    pipe = fresh(scheduler)
    latents(pipe)
    both = torch.cat(pipe.encode_prompt(PROMPT, "cpu", 1, True)[::-1])
    calls.clear()
    with apply_layout(pipe, PROMPT, REGIONS):
        own_loop(pipe, both, 1, copies=2, times=2)
    assert len(calls) == 3 * 2 * layers
    assert {call[0].shape[0] for call in calls} == {1}
    with (
        semantic_guidance(pipe, [Edit("fog")]),
        pytest.raises(ValueError, match="must call its U-Net once a step"),
    ):
        own_loop(pipe, both, 1, copies=2, times=2)


@pytest.mark.parametrize("mode", ["plain", "inference"])
@pytest.mark.parametrize("model", ["sd", "flux"])
def test_embeddings_that_a_callback_changes_in_place(model: str, mode: str) -> None:
    pipe = pipeline(model)

    def in_place(_pipe: object, _step: int, _t: object, given: dict) -> dict:
        given["prompt_embeds"].mul_(1.5)
        return {}

    def anew(_pipe: object, _step: int, _t: object, given: dict) -> dict:
        return {"prompt_embeds": given["prompt_embeds"] * 1.5}

    results = []
    for callback in (in_place, anew):
        with torch.inference_mode(mode == "inference"), apply_layout(pipe, PROMPT, REGIONS):
            found = latents(
                pipe,
                callback_on_step_end=callback,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
                steps=4,
            )
            results.append(found.clone())
    assert torch.equal(*results)


def test_a_wide_grid_of_flux_in_bfloat16(calls: list) -> None:
    """Past 256 its places are rounded; the tokens are counted."""
    pipe = tiny_pipeline(diffusers.FluxPipeline).to(torch.bfloat16)
    with apply_layout(pipe, PROMPT, REGIONS):
        latents(pipe, steps=1, height=16, width=1204)
    masks = Layout.from_boxes([box for _, box in REGIONS], (512, 512)).masks
    masks = torch.nn.functional.interpolate(masks[None].to(torch.uint8), (8, 602), mode="nearest")[
        0
    ].bool()
    expected = Layout(masks).query_regions(4, 301)
    for call in calls:
        assert torch.equal(call[3][0, 24:], expected)
    assert calls


def test_places_that_are_no_grid() -> None:
    pipe = fresh()
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    ids = pipe._prepare_latent_image_ids

    def shuffled(*args: object) -> Tensor:
        places = ids(*args)
        return places[torch.randperm(len(places), generator=torch.Generator().manual_seed(0))]

    pipe._prepare_latent_image_ids = shuffled
    with (
        apply_layout(pipe, PROMPT, REGIONS),
        pytest.raises(ValueError, match="pipe must number its image tokens row"),
    ):
        latents(pipe, steps=1)


def test_a_repeated_call_for_the_negative_prompt(calls: list) -> None:
    """A second call of a step with half of the rows is the prompt's, or the negative one's."""
    pipe = fresh("EulerDiscrete")
    latents(pipe)
    text, empty = pipe.encode_prompt(PROMPT, "cpu", 1, True)
    both, again = torch.cat([empty, text]), types.SimpleNamespace(text=text)

    def loop() -> None:
        pipe.scheduler.set_timesteps(10)
        x = torch.randn(1, 4, 8, 12)
        with torch.no_grad():
            for t in pipe.scheduler.timesteps:
                eps = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=both).sample[:1]
                pipe.unet(x, t, encoder_hidden_states=again.text)
                x = pipe.scheduler.step(eps, t, x).prev_sample

    layers = len(pipe.unet.attn_processors)
    for again.text, expected in ((text, 2), (empty, 1)):
        calls.clear()
        with apply_layout(pipe, PROMPT, REGIONS):
            loop()
        assert len(calls) == 3 * layers * expected


@pytest.mark.parametrize("guides", [True, False])
def test_texts_that_are_made_anew_in_each_call_are_looked_at_twice_a_run(
    guides: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that stay are looked at once, and again where they are changed or others."""
    scheduler = types.SimpleNamespace(timesteps=torch.arange(5))
    pipe = types.SimpleNamespace(scheduler=scheduler, do_classifier_free_guidance=guides)
    looked: list[bool] = []
    monkeypatch.setattr(rows, "check_halves", lambda x, by_value: looked.append(by_value))
    monkeypatch.setattr(rows.Rows, "_check_texts", lambda self, x, text: looked.append(True))
    following, x = rows.Rows(pipe, 1, "halves"), torch.zeros(2, 4, 2, 2)

    def looks(*texts: Tensor) -> int:
        looked.clear()
        for text in texts:
            following.of(x, text, repeated=False)
        return sum(looked)

    kept = torch.zeros(2, 3, 4)
    assert looks(kept, kept, kept) == 1
    assert looks(kept.add_(1), kept) == 1
    assert looks(*(kept.clone() for _ in range(3)), kept) == 4  # a callback's
    assert looks(kept, kept) == 0
    scheduler.timesteps = torch.arange(5)
    assert looks(*(kept.clone() for _ in range(5))) == 2
    assert looks(*(torch.zeros(2, 4, 4) for _ in range(5))) == 2
    scheduler.timesteps = torch.arange(5)
    assert looks(*(torch.zeros(2, 4, 4) for _ in range(5))) == 2
