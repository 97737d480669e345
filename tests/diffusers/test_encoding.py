"""Blocks hear how a call encodes its prompt: its options reach phrases and concepts, another prompt
is told.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from pipelines import FAMILIES, PROMPT, REGIONS, close, diffusers, latents, pipeline
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Edit, apply_layout, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")
ENCODERS = {
    "sd": [""],
    "sdxl": ["", "_2"],
    "sd3": ["", "_2"],
    "flux": ["_2"],
}  # whose tokens a denoiser sees
OPTION = {"sd": "cross_attention_kwargs", "sdxl": "cross_attention_kwargs"}


def deep(family: str) -> object:
    """A pipeline whose CLIP encoders have layers to skip."""
    pipe = tiny_pipeline(FAMILIES[family][0])
    for suffix in ["", "_2"][: 1 if family in ("sd", "flux") else 2]:
        encoder = getattr(pipe, f"text_encoder{suffix}")
        encoder.config.num_hidden_layers = 4
        torch.manual_seed(0)
        setattr(pipe, f"text_encoder{suffix}", type(encoder)(encoder.config).eval())
    return pipe


def with_lora(family: str) -> object:
    """A pipeline whose text encoders have a LoRA."""
    peft = pytest.importorskip("peft")
    pipe = deep(family)
    for suffix in ENCODERS[family]:
        encoder = getattr(pipe, f"text_encoder{suffix}")
        targets = (
            ["q", "v", "k", "o"] if family == "flux" else ["q_proj", "k_proj", "v_proj", "out_proj"]
        )
        torch.manual_seed(1)
        encoder.add_adapter(
            peft.LoraConfig(r=4, lora_alpha=64, init_lora_weights=False, target_modules=targets)
        )
    return pipe


@contextmanager
def texts_of(pipe: object) -> Iterator[list[Tensor]]:
    """The text tokens of the denoiser's calls."""
    texts: list[Tensor] = []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    parameters = list(inspect.signature(type(denoiser).forward).parameters)[1:]

    def see(_denoiser: object, args: tuple, given: dict) -> None:
        texts.append((dict(zip(parameters, args)) | given)["encoder_hidden_states"])

    handle = denoiser.register_forward_pre_hook(see, with_kwargs=True)
    yield texts
    handle.remove()


def encoded(pipe: object, text: str, **options: object) -> Tensor:
    """The tokens of a prompt as the pipeline encodes it."""
    known = inspect.signature(pipe.encode_prompt).parameters
    given = {"prompt_2": None, "prompt_3": None, "device": "cpu", "num_images_per_prompt": 1,
             "do_classifier_free_guidance": False, **options}  # fmt: skip
    with torch.no_grad():
        return pipe.encode_prompt(
            text, **{name: value for name, value in given.items() if name in known}
        )[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_phrases_have_the_lora_scale_of_the_call(family: str) -> None:
    pipe, own = with_lora(family), FAMILIES[family][1]
    start = {"sd": 2, "sdxl": 2, "sd3": 2, "flux": 2}[family]
    length = 4 if family == "flux" else 3
    scales, found = [None, 0.5, 0.5, 0.0, None], []
    with apply_layout(pipe, PROMPT, [("cat", (0.0, 0.0, 0.5, 1.0))]), texts_of(pipe) as texts:
        for scale in scales:
            texts.clear()
            option = OPTION.get(family, "joint_attention_kwargs")
            latents(pipe, steps=1, **({} if scale is None else {option: {"scale": scale}}))
            found.append(texts[0][-1, start : start + length])
    for scale, tokens in zip(scales, found):
        alone = encoded(pipe, "cat", lora_scale=scale, **own)[0]
        assert torch.equal(tokens, alone[start - 1 - (family == "flux") :][:length])
    assert not close(found[1], found[0])
    assert not close(found[3], found[1])


@pytest.mark.filterwarnings("ignore:edits.*warmup must be at most")  # fewer steps than that
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_concepts_have_the_lora_scale_of_the_call(family: str) -> None:
    pipe, seen = with_lora(family), []
    with semantic_guidance(pipe, [Edit("fog"), Edit("sky")]):
        for scale in (None, 0.5, 0.0, None):
            with texts_of(pipe) as texts:
                latents(
                    pipe,
                    steps=1,
                    **({} if scale is None else {"cross_attention_kwargs": {"scale": scale}}),
                )
            rows = texts[0][2:]
            assert torch.equal(
                rows, torch.cat([encoded(pipe, text, lora_scale=scale) for text in ("fog", "sky")])
            )
            seen.append(rows)
    assert not close(seen[1], seen[0])


@pytest.mark.filterwarnings("ignore:edits.*warmup must be at most")  # fewer steps than that
def test_concepts_have_the_pooled_lora_scale_of_the_call() -> None:
    """Stable Diffusion XL's U-Net sees the pooled embeddings too."""
    pipe, pooled = with_lora("sdxl"), []

    def see(_unet: object, _args: tuple, given: dict) -> None:
        pooled.append(given["added_cond_kwargs"]["text_embeds"][2:])

    with semantic_guidance(pipe, [Edit("fog")]):
        handle = pipe.unet.register_forward_pre_hook(see, with_kwargs=True)
        latents(pipe, steps=1)
        latents(pipe, steps=1, cross_attention_kwargs={"scale": 0.5})
        handle.remove()
    assert not close(pooled[1], pooled[0])


@pytest.mark.parametrize(
    ("family", "options"), [("sdxl", {"clip_skip": 1}), ("flux", {"max_sequence_length": 28})]
)
def test_phrases_have_the_other_options_of_the_call(family: str, options: dict) -> None:
    pipe, own = deep(family), FAMILIES[family][1]
    with apply_layout(pipe, PROMPT, [("cat", (0.0, 0.0, 0.5, 1.0))]), texts_of(pipe) as texts:
        latents(pipe, steps=1, **options)
    start, stop = (2, 6) if family == "flux" else (2, 5)
    here = 0 if family == "flux" else 1
    right, other = encoded(pipe, "cat", **options)[0][here:], encoded(pipe, "cat", **own)[0][here:]
    assert torch.equal(texts[0][-1, start:stop], right[: stop - start])
    assert not close(texts[0][-1, start:stop], other[: stop - start])


def test_options_stay_those_of_the_prompt_beside_negative_embeddings() -> None:
    """FLUX encodes the negative prompt in a call of its own, after the prompt's."""
    pipe = deep("flux")
    negative = {"negative_prompt_embeds": encoded(pipe, "fog", max_sequence_length=28), "true_cfg_scale": 2.0,
                "negative_pooled_prompt_embeds": torch.zeros(1, 16)}  # fmt: skip
    with apply_layout(pipe, PROMPT, [("cat", (0.0, 0.0, 0.5, 1.0))]), texts_of(pipe) as texts:
        latents(pipe, steps=1, max_sequence_length=28, **negative)
    assert torch.equal(texts[0][0, 2:6], encoded(pipe, "cat", max_sequence_length=28)[0, :4])


def told(pipe: object, layout: object, run: object, regions: object = REGIONS) -> list[str]:
    """The words of a block around a run."""
    with warnings.catch_warnings(record=True) as all_of_them:
        warnings.simplefilter("always")
        with apply_layout(pipe, layout, regions):
            run()
    messages = [str(warning.message) for warning in all_of_them]
    return [message for message in messages if "the layout's" in message]


@pytest.mark.parametrize("family", FAMILIES)
def test_another_prompt_is_told_once_a_block(family: str) -> None:
    pipe = pipeline(family)

    def twice() -> None:
        for _ in range(2):
            latents(pipe, "a dog cat", steps=2)

    (said,) = told(pipe, PROMPT, twice)
    assert (
        said
        == f"the call's prompt 'a dog cat' is not the layout's {PROMPT!r}, by which phrases are placed"
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


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_the_same_prompt_is_not_told(family: str) -> None:
    pipe = deep(family)
    calls: list[tuple[object, dict]] = [
        (PROMPT, {"num_images_per_prompt": 2}), (PROMPT, {"negative_prompt": "a dog cat"}), ([PROMPT] * 2, {}),
        (PROMPT, {"guidance_scale": 1.0}),
    ]  # fmt: skip
    calls += [(PROMPT, {"prompt_2": "fog"})] * (family == "sdxl") + [
        ("fog", {"prompt_2": PROMPT})
    ] * (family == "flux")
    calls += [(PROMPT, {"clip_skip": 1})] * (family in ("sdxl", "sd3")) + [(PROMPT.upper(), {})] * (
        family in ("sd", "sdxl")
    )
    calls += [(PROMPT, {"negative_prompt": "fog", "true_cfg_scale": 2.0})] * (family == "flux")

    def run() -> None:
        for prompt, options in calls:
            latents(pipe, prompt, steps=1, **options)

    assert told(pipe, PROMPT, run) == []


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_another_prompt_for_the_tokenizer_whose_tokens_count(family: str) -> None:
    pipe, name = pipeline(family), "prompt_2" if family == "flux" else "prompt_3"
    assert len(told(pipe, PROMPT, lambda: latents(pipe, steps=1, **{name: "a dog cat"}))) == 1


def given_as(family: str, embeddings: Tensor, pipe: object) -> dict:
    """The arguments of a call with embeddings of the caller's own."""
    pooled = (
        {}
        if family == "sd"
        else {"pooled_prompt_embeds": torch.zeros(len(embeddings), 32 if family == "sd3" else 16)}
    )
    return {"prompt_embeds": embeddings, "guidance_scale": 1.0, **pooled}


@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_of_the_callers_own_are_compared(family: str) -> None:
    """The prompt's are its own in any weight, dtype and number of tokens; another prompt's are
    told.
    """
    pipe, own = deep(family), FAMILIES[family][1]
    right, other, empty = (encoded(pipe, text, **own) for text in (PROMPT, "a dog cat", ""))
    same = [
        right,
        right.bfloat16().float(),
        1.2 * right,
        empty + 1.3 * (right - empty),
        right.repeat(2, 1, 1),
    ]
    same += [encoded(pipe, PROMPT, max_sequence_length=28)] if own else []
    if family == "sd":
        same.append(
            torch.cat([right, empty], 1)
        )  # a longer prompt than the tokenizer takes, in parts
    for embeddings in same:
        assert (
            told(
                pipe,
                PROMPT,
                lambda given=embeddings: latents(
                    pipe, None, steps=1, **given_as(family, given, pipe)
                ),
            )
            == []
        )
    for embeddings in (other, empty, torch.cat([right, other])):
        run = lambda given=embeddings: latents(pipe, None, steps=2, **given_as(family, given, pipe))  # noqa: E731
        (said,) = told(pipe, [PROMPT] * len(embeddings), run, [REGIONS] * len(embeddings))
        assert (
            said
            == f"the call's prompt_embeds are not what the layout's {PROMPT!r} encodes to, by which phrases are placed"
        )


def test_one_text_for_all_images_of_flux() -> None:
    """FLUX repeats no embeddings of the caller's own; its network takes one row for all latents."""
    pipe = deep("flux")
    given = given_as("flux", encoded(pipe, PROMPT, max_sequence_length=24), pipe)
    runs = []
    for times in (1, 2):
        texts = {name: value.repeat(times, *[1] * (value.dim() - 1)) for name, value in given.items() if times > 1
                 and isinstance(value, Tensor)}  # fmt: skip
        with apply_layout(pipe, PROMPT, REGIONS):
            runs.append(
                latents(pipe, None, steps=4, num_images_per_prompt=2 // times, **given | texts)
            )
    assert close(*runs)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_one_seed_whose_embeddings_are_nearly_the_prompts(family: str) -> None:
    """As many texts as the pipeline was given hold no negative half; other texts in the same rows
    may.
    """
    pipe, own = pipeline(family), FAMILIES[family][1]
    right, empty = (encoded(pipe, text, **own) for text in (PROMPT, ""))
    noise = [torch.Generator().manual_seed(0) for _ in range(2)]
    with apply_layout(pipe, PROMPT, REGIONS):
        given = given_as(family, torch.cat([right, 1.02 * right]), pipe)
        assert latents(pipe, None, steps=1, generator=noise, **given).isfinite().all()
        given = given_as(family, torch.cat([empty, right]), pipe)
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
    """Text encoders that were moved out of the way of the pipeline's device cannot be called any
    more.
    """
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    other = encoded(pipe, "a dog cat")

    def elsewhere(*_: object, **__: object) -> None:
        raise RuntimeError("Expected all tensors to be on the same device")

    def run() -> None:
        monkeypatch.setattr(pipe.text_encoder, "forward", elsewhere)
        latents(pipe, None, steps=1, prompt_embeds=other, negative_prompt_embeds=other)

    assert told(pipe, PROMPT, run) == []


def test_texts_of_the_library_and_of_the_user_beside_the_call() -> None:
    """Concepts, inner layouts and the user's own texts are no prompt of a call."""
    pipe = pipeline("sd")

    def run() -> None:
        with semantic_guidance(pipe, [Edit("a dog cat")]):
            negative = encoded(pipe, "fog")
            latents(
                pipe,
                steps=2,
                negative_prompt_embeds=negative,
                cross_attention_kwargs={"scale": 0.5},
            )
        with apply_layout(pipe, "fog", [("fog", (0.0, 0.0, 1.0, 1.0))]):
            latents(pipe, "fog", steps=1)
        latents(pipe, steps=2)

    assert told(pipe, PROMPT, run) == []


def test_encode_prompt_is_restored() -> None:
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    with apply_layout(pipe, PROMPT, REGIONS), semantic_guidance(pipe, [Edit("fog")]):
        assert "encode_prompt" in vars(pipe)
    assert "encode_prompt" not in vars(pipe)
    outer, inner = (apply_layout(pipe, PROMPT, REGIONS) for _ in range(2))
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    assert "encode_prompt" in vars(pipe)
    inner.__exit__(None, None, None)
    assert "encode_prompt" not in vars(pipe)
    pipe.encode_prompt = mine = pipe.encode_prompt
    with pytest.raises(ZeroDivisionError), apply_layout(pipe, PROMPT, REGIONS):
        raise ZeroDivisionError
    assert pipe.encode_prompt is mine
