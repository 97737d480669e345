"""Another prompt than the layout's is told of, whether it comes as words or as embeddings."""

from __future__ import annotations

import pytest
import torch
from families import family, made_of, run
from pipelines import MODELS, PROMPT, REGIONS, close, diffusers, latents, pipeline
from texts import deep, encoded, told
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
MASK = "prompt_attention_mask"


@pytest.mark.parametrize("model", MODELS)
def test_another_prompt_is_told_once_a_block(model: str) -> None:
    pipe = pipeline(model)

    def twice() -> None:
        for _ in range(2):
            latents(pipe, "a dog cat", steps=2)

    (said,) = told(pipe, PROMPT, twice)
    assert said == (
        f"the call's prompt 'a dog cat' is not the layout's {PROMPT!r}, by which phrases are placed"
    )
    assert (
        len(told(pipe, [PROMPT, "cat dog"], lambda: latents(pipe, [PROMPT, "dog cat"], steps=1)))
        == 1
    )
    assert told(pipe, PROMPT, lambda: latents(pipe, steps=2)) == []
    assert (
        len(
            told(
                pipe,
                PROMPT,
                lambda: [latents(pipe, text, steps=1) for text in (PROMPT, "a dog cat")],
            )
        )
        == 1
    )


@pytest.mark.parametrize("model", MODELS)
def test_what_is_the_same_prompt_is_not_told(model: str) -> None:
    pipe = deep(model)
    calls: list[tuple[object, dict]] = [
        (PROMPT, {"num_images_per_prompt": 2}),
        (PROMPT, {"negative_prompt": "a dog cat"}),
        ([PROMPT] * 2, {}),
        (PROMPT, {"guidance_scale": 1.0}),
    ]
    calls += [(PROMPT, {"prompt_2": "fog"})] * (model == "sdxl") + [
        ("fog", {"prompt_2": PROMPT})
    ] * (model == "flux")
    calls += [(PROMPT, {"clip_skip": 1})] * (model in ("sdxl", "sd3")) + [(PROMPT.upper(), {})] * (
        model in ("sd", "sdxl")
    )
    calls += [(PROMPT, {"negative_prompt": "fog", "true_cfg_scale": 2.0})] * (model == "flux")

    def run() -> None:
        for prompt, options in calls:
            latents(pipe, prompt, steps=1, **options)

    assert told(pipe, PROMPT, run) == []


@pytest.mark.parametrize("model", ["flux", "sd3"])
def test_another_prompt_for_the_tokenizer_whose_tokens_count(model: str) -> None:
    pipe, name = pipeline(model), "prompt_2" if model == "flux" else "prompt_3"
    assert len(told(pipe, PROMPT, lambda: latents(pipe, steps=1, **{name: "a dog cat"}))) == 1


def given_as(model: str, embeddings: Tensor, pipe: object) -> dict:
    """The arguments of a call with embeddings of the caller's own."""
    pooled = (
        {}
        if model == "sd"
        else {"pooled_prompt_embeds": torch.zeros(len(embeddings), 32 if model == "sd3" else 16)}
    )
    return {"prompt_embeds": embeddings, "guidance_scale": 1.0, **pooled}


@pytest.mark.parametrize("model", MODELS)
def test_embeddings_of_the_callers_own_are_compared(model: str) -> None:
    """Embeddings of the prompt in any weight, dtype and length are its own; others are told."""
    pipe, own = deep(model), MODELS[model][1]
    right, other, empty = (encoded(pipe, text, **own) for text in (PROMPT, "a dog cat", ""))
    same = [
        right,
        right.bfloat16().float(),
        1.2 * right,
        empty + 1.3 * (right - empty),
        right.repeat(2, 1, 1),
    ]
    same += [encoded(pipe, PROMPT, max_sequence_length=28)] if own else []
    if model == "sd":
        # a longer prompt than the tokenizer takes, in parts
        same.append(torch.cat([right, empty], 1))
    for embeddings in same:
        assert (
            told(
                pipe,
                PROMPT,
                lambda given=embeddings: latents(
                    pipe, None, steps=1, **given_as(model, given, pipe)
                ),
            )
            == []
        )
    for embeddings in (other, empty, torch.cat([right, other])):
        run = lambda given=embeddings: latents(pipe, None, steps=2, **given_as(model, given, pipe))  # noqa: E731
        (said,) = told(pipe, [PROMPT] * len(embeddings), run, [REGIONS] * len(embeddings))
        assert said == (
            f"the call's prompt_embeds are not what the layout's {PROMPT!r} encodes to, by "
            "which phrases are placed"
        )


def test_one_text_for_all_images_of_flux() -> None:
    """FLUX repeats no embeddings of the caller's own; its network takes one row for all latents."""
    pipe = deep("flux")
    given = given_as("flux", encoded(pipe, PROMPT, max_sequence_length=24), pipe)
    runs = []
    for times in (1, 2):
        texts = {
            name: value.repeat(times, *[1] * (value.dim() - 1))
            for name, value in given.items()
            if times > 1 and isinstance(value, Tensor)
        }
        with apply_layout(pipe, PROMPT, REGIONS):
            runs.append(
                latents(pipe, None, steps=4, num_images_per_prompt=2 // times, **given | texts)
            )
    assert close(*runs)


@pytest.mark.parametrize("model", MODELS)
def test_rows_of_one_seed_whose_embeddings_are_nearly_the_prompts(model: str) -> None:
    """Texts as many as the pipeline was given hold no negative half; others may."""
    pipe, own = pipeline(model), MODELS[model][1]
    right, empty = (encoded(pipe, text, **own) for text in (PROMPT, ""))
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    with apply_layout(pipe, PROMPT, REGIONS):
        given = given_as(model, torch.cat([right, 1.02 * right]), pipe)
        assert latents(pipe, None, steps=1, generator=noise, **given).isfinite().all()
        given = given_as(model, torch.cat([empty, right]), pipe)
        noise = [torch.Generator().manual_seed(0) for _ in range(2)]
        with (
            pytest.warns(UserWarning, match="prompt_embeds are not"),
            pytest.raises(ValueError, match="tell that it"),
        ):
            latents(pipe, None, steps=1, generator=noise, **given)


def test_embeddings_that_cannot_be_compared() -> None:
    """Without the text encoder nothing is known of them."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    other = encoded(pipe, "a dog cat")

    def run() -> None:
        pipe.text_encoder = None
        latents(pipe, None, steps=1, prompt_embeds=other, negative_prompt_embeds=other)

    assert told(pipe, PROMPT, run) == []


def test_embeddings_beside_an_encoder_that_is_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoders that were moved away from the pipeline's device cannot be called any more."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    other = encoded(pipe, "a dog cat")

    def elsewhere(*_: object, **__: object) -> None:
        raise RuntimeError("Expected all tensors to be on the same device")

    def run() -> None:
        monkeypatch.setattr(pipe.text_encoder, "forward", elsewhere)
        latents(pipe, None, steps=1, prompt_embeds=other, negative_prompt_embeds=other)

    assert told(pipe, PROMPT, run) == []


def test_a_negative_prompt_beside_embeddings_that_are_not_heard() -> None:
    """Kandinsky 5's encode_prompt gets none; a prompt that it hears alone is told of."""
    pipe = family("kandinsky5")
    with torch.no_grad():
        embeddings = pipe.encode_prompt(prompt=PROMPT)
    names = "prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens"
    given = dict(zip(names, embeddings))
    assert told(pipe, PROMPT, lambda: run("kandinsky5", None, steps=1, **given)) == []
    other = {"prompt": "a dog cat", "steps": 1}
    assert len(told(pipe, PROMPT, lambda: run("kandinsky5", **other))) == 1
    assert len(told(pipe, PROMPT, lambda: run("kandinsky5", guidance_scale=1.0, **other))) == 1


@pytest.mark.parametrize("name", ["cogvideox", "ltx"])
def test_phrases_beside_embeddings_are_padded_as_these(name: str) -> None:
    pipe, own = family(name), {"max_sequence_length": made_of(name)[1]["max_sequence_length"]}
    with torch.no_grad():
        texts = pipe.encode_prompt(PROMPT, negative_prompt="", **own)
    names = [f"{side}{kind}" for side in ("", "negative_") for kind in ("prompt_embeds", MASK)]
    names = names if len(texts) == 4 else ["prompt_embeds", "negative_prompt_embeds"]
    given = {"negative_prompt": None, **dict(zip(names, texts))}
    with apply_layout(pipe, PROMPT, REGIONS):
        right, ours = run(name, PROMPT, steps=1), run(name, None, steps=1, **given)
    assert torch.equal(ours, right)
