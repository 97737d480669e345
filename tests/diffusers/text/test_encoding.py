"""Blocks hear how a call encodes its prompt: its options reach phrases and concepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from families import family, run
from pipelines import MODELS, PROMPT, REGIONS, close, diffusers, latents, pipeline
from texts import deep, encoded, told
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Edit, apply_layout, semantic_guidance

pytestmark = pytest.mark.usefixtures("one_thread")
# whose tokens a denoiser sees
ENCODERS = {"sd": [""], "sdxl": ["", "_2"], "sd3": ["", "_2"], "flux": ["_2"]}
OPTION = {"sd": "cross_attention_kwargs", "sdxl": "cross_attention_kwargs"}


def with_lora(model: str) -> object:
    """A pipeline whose text encoders have a LoRA."""
    peft = pytest.importorskip("peft")
    pipe = deep(model)
    for suffix in ENCODERS[model]:
        encoder = getattr(pipe, f"text_encoder{suffix}")
        targets = (
            ["q", "v", "k", "o"] if model == "flux" else ["q_proj", "k_proj", "v_proj", "out_proj"]
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


@pytest.mark.parametrize("model", MODELS)
def test_phrases_have_the_lora_scale_of_the_call(model: str) -> None:
    pipe, own = with_lora(model), MODELS[model][1]
    start = {"sd": 2, "sdxl": 2, "sd3": 2, "flux": 2}[model]
    length = 4 if model == "flux" else 3
    scales, found = [None, 0.5, 0.5, 0.0, None], []
    with apply_layout(pipe, PROMPT, [("cat", (0.0, 0.0, 0.5, 1.0))]), texts_of(pipe) as texts:
        for scale in scales:
            texts.clear()
            option = OPTION.get(model, "joint_attention_kwargs")
            latents(pipe, steps=1, **({} if scale is None else {option: {"scale": scale}}))
            found.append(texts[0][-1, start : start + length])
    for scale, tokens in zip(scales, found):
        alone = encoded(pipe, "cat", lora_scale=scale, **own)[0]
        assert torch.equal(tokens, alone[start - 1 - (model == "flux") :][:length])
    assert not close(found[1], found[0])
    assert not close(found[3], found[1])


@pytest.mark.filterwarnings("ignore:edits.*warmup must be at most")  # fewer steps than that
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_concepts_have_the_lora_scale_of_the_call(model: str) -> None:
    pipe, seen = with_lora(model), []
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
                rows,
                torch.cat([encoded(pipe, text, lora_scale=scale) for text in ("fog", "sky")]),
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
    ("model", "options"), [("sdxl", {"clip_skip": 1}), ("flux", {"max_sequence_length": 28})]
)
def test_phrases_have_the_other_options_of_the_call(model: str, options: dict) -> None:
    pipe, own = deep(model), MODELS[model][1]
    with apply_layout(pipe, PROMPT, [("cat", (0.0, 0.0, 0.5, 1.0))]), texts_of(pipe) as texts:
        latents(pipe, steps=1, **options)
    start, stop = (2, 6) if model == "flux" else (2, 5)
    here = 0 if model == "flux" else 1
    right, other = (
        encoded(pipe, "cat", **options)[0][here:],
        encoded(pipe, "cat", **own)[0][here:],
    )
    assert torch.equal(texts[0][-1, start:stop], right[: stop - start])
    assert not close(texts[0][-1, start:stop], other[: stop - start])


def test_options_stay_those_of_the_prompt_beside_negative_embeddings() -> None:
    """FLUX encodes the negative prompt in a call of its own, after the prompt's."""
    pipe = deep("flux")
    negative = {
        "negative_prompt_embeds": encoded(pipe, "fog", max_sequence_length=28),
        "true_cfg_scale": 2.0,
        "negative_pooled_prompt_embeds": torch.zeros(1, 16),
    }
    with apply_layout(pipe, PROMPT, [("cat", (0.0, 0.0, 0.5, 1.0))]), texts_of(pipe) as texts:
        latents(pipe, steps=1, max_sequence_length=28, **negative)
    assert torch.equal(texts[0][0, 2:6], encoded(pipe, "cat", max_sequence_length=28)[0, :4])


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


@torch.no_grad()
def test_a_text_encoder_that_changes_between_calls() -> None:
    """The phrases of the next call are its own, whatever changed it, such as a LoRA."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    with apply_layout(pipe, PROMPT, REGIONS):
        first = latents(pipe, steps=2)
        for weight in pipe.text_encoder.parameters():
            weight.mul_(1.5)
        changed = latents(pipe, steps=2)
    with apply_layout(pipe, PROMPT, REGIONS):
        assert torch.equal(latents(pipe, steps=2), changed)
    assert not torch.equal(first, changed)


def test_phrases_beside_several_images_are_encoded_once_a_call() -> None:
    """The prompt, the negative one, and two phrases."""
    pipe, calls = family("qwen_edit_plus"), []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        with apply_layout(pipe, PROMPT, REGIONS):
            run("qwen_edit_plus", PROMPT, steps=1)
    finally:
        handle.remove()
    assert len(calls) == 4
