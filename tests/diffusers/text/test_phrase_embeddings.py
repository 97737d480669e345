"""A phrase's tokens and embeddings where its prompt is longer, padded on the left, or learned."""

from __future__ import annotations

import types

import pytest
import texts
import torch
from pipelines import PROMPT, diffusers, latents
from texts import KINDS, TOKENS
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import Phrase, apply_layout

pytestmark = pytest.mark.usefixtures("one_thread")
BOX = (0.0, 0.0, 0.5, 1.0)
OTHER = (0.5, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phrase", ["red cat", "dog"])
def test_a_phrase_gets_the_embeddings_that_it_has_alone(kind: str, phrase: str) -> None:
    """The rows of the U-Net's text are, token by token, those of a prompt that is the phrase."""
    pipe, prompt = texts.with_tokenizer(KINDS[kind]()), "a red cat on the dog"
    given, alone = (
        texts.text_of(pipe, prompt, phrase),
        pipe.encode_prompt(phrase, "cpu", 1, False)[0][0],
    )
    ids, own = (
        pipe.tokenizer(text, padding="max_length", max_length=TOKENS).input_ids
        for text in (prompt, phrase)
    )
    wanted = pipe.tokenizer(phrase, add_special_tokens=False).input_ids
    here, there = (
        next(i for i in range(TOKENS) if line[i : i + len(wanted)] == wanted) for line in (ids, own)
    )
    assert torch.equal(given[here : here + len(wanted)], alone[there : there + len(wanted)])


def test_tokens_of_a_phrase_that_are_others_alone() -> None:
    """After a bracket T5's word has no mark: letters get what stands for them in the phrase."""
    pipe = texts.with_tokenizer(KINDS["glm"]())
    given = texts.text_of(pipe, "a (dogs", "dogs")
    dog, s = pipe.encode_prompt("dogs", "cpu", 1, False)[0][0][-2:]  # "▁dog" and "s"
    assert pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer("a (dogs").input_ids)[-4:] == [
        "d",
        "o",
        "g",
        "s",
    ]
    assert torch.equal(given[-4:], torch.stack([dog, dog, dog, s]))


def test_padding_on_the_left_follows_the_length_of_the_call(calls: list) -> None:
    """FLUX is called with 24 tokens, or 28: the place is counted from the end."""
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    pipe.tokenizer_2.padding_side = "left"
    for size in (24, 28):
        calls.clear()
        with apply_layout(pipe, PROMPT, [("dog", BOX)]):
            latents(pipe, max_sequence_length=size)
        ids = pipe.tokenizer_2(PROMPT, padding="max_length", max_length=size).input_ids
        start = len(ids) - 5  # _ d o g </s>
        assert calls[0][4][0, :size].nonzero().flatten().tolist() == list(range(start, start + 4))


def test_a_learned_word_of_several_tokens(calls: list) -> None:
    """Textual inversion writes a word out for tokenizers; spans count the user's characters."""
    pipe = texts.with_tokenizer(KINDS["clip"]())
    pipe.tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    prompt, places = "a <toy> on a red cat", []
    for phrase in ("<toy>", Phrase(span=(2, 7)), "red cat", Phrase(span=(13, 20))):
        calls.clear()
        with apply_layout(pipe, prompt, [(phrase, BOX)], self_weight=0):
            latents(pipe, prompt, steps=1)
        places.append(calls[0][4][0].nonzero().flatten().tolist())
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids
    tokens = pipe.tokenizer.convert_ids_to_tokens(ids)
    assert [tokens[i] for i in places[0]] == ["<toy>", "<toy>_1", "<toy>_2"]
    assert "".join(tokens[i] for i in places[2]) == "red</w>cat</w>"
    assert places[0] == places[1]
    assert places[2] == places[3]
    with pytest.raises(ValueError, match="have a phrase that cuts no learned word, got 'to'"):
        apply_layout(pipe, prompt, [(Phrase(span=(3, 5)), BOX)]).__enter__()


class Kolors(torch.nn.Module):
    """A text encoder called as ChatGLM: hidden states [L, B, C]; the last but one counts."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(num_tokens, 32)

    def forward(self, input_ids: Tensor, **_: object) -> object:
        states = self.embedding(input_ids).transpose(0, 1)
        return types.SimpleNamespace(hidden_states=[states, states])


def test_kolors_pads_on_the_left_to_the_length_of_its_own(
    calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 tokens, whatever the tokenizer's own limit is."""
    # diffusers' own name asks for sentencepiece
    from diffusers.pipelines.kolors.pipeline_kolors import KolorsPipeline

    from dense_attn.examples import _tiny_pipeline as tiny

    tokenizer, original = KINDS["glm"](), texts.Glm.__call__
    monkeypatch.setattr(
        texts.Glm, "__call__", lambda *args, **options: with_positions(original(*args, **options))
    )
    unet = tiny._unet(
        2,
        32,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    pipe = KolorsPipeline(tiny._vae(4), Kolors(len(tokenizer)), tokenizer, unet, tiny._ddim())
    pipe.set_progress_bar_config(disable=True)
    prompt = "a catfish on the cat"
    with apply_layout(pipe, prompt, [("cat", BOX)], self_weight=0):
        pipe(prompt, height=16, width=16, num_inference_steps=2, output_type="latent")
    assert calls[0][4].shape == (1, 256)
    assert calls[0][4][0].nonzero().flatten().tolist() == [255]


def with_positions(read: dict) -> dict:
    read["position_ids"] = read["attention_mask"]
    return read
