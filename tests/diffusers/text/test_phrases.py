"""Where phrases are found: what the ids that a network gets decode to there, with tokenizers of
every manner.
"""

from __future__ import annotations

import doctest
import types
import warnings
from collections.abc import Callable

import pytest
import texts
import torch
from pipelines import PROMPT, REGIONS, diffusers, latents, pipeline
from texts import KINDS, TOKENS
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations import diffusers as integration
from dense_attn.integrations.diffusers import Phrase, apply_layout, state
from dense_attn.integrations.diffusers.text.tokens import tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")
BOX = (0.0, 0.0, 0.5, 1.0)
OTHER = (0.5, 0.0, 1.0, 1.0)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The region words of the keys of all calls of layout_attention."""
    words: list[Tensor] = []
    original: Callable = state.layout_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, **options: object) -> Tensor:
        words.append(rest[1])
        return original(q, k, v, *rest, **options)

    monkeypatch.setattr(state, "layout_attention", watched)
    return words


def with_tokenizer(tokenizer: object) -> object:
    """Stable Diffusion that reads with another tokenizer, and an encoder as large as it needs."""
    pipe = tiny_pipeline(diffusers.StableDiffusionPipeline)
    config = pipe.text_encoder.config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), TOKENS
    config.pad_token_id, config.eos_token_id = None, 1
    torch.manual_seed(0)
    pipe.tokenizer, pipe.text_encoder = tokenizer, type(pipe.text_encoder)(config).eval()
    return pipe


def painted(pipe: object, prompt: str, regions: list, seen: list, **options: object) -> list[str]:
    """The words that the text tokens of each region decode to, of those that the pipeline's own
    call makes.
    """
    seen.clear()
    with apply_layout(pipe, prompt, regions, self_weight=0, active=1.0, **options):
        latents(pipe, prompt, steps=1)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=TOKENS, truncation=True).input_ids
    found = []
    for bit in range(len(regions)):
        of_region = [token for token, word in zip(ids, seen[0][0].tolist()) if word == 1 << bit]
        found.append(pipe.tokenizer.decode(of_region).strip())
    return found


def text_of(pipe: object, prompt: str, phrase: str) -> Tensor:
    """The text tokens that the U-Net gets for a prompt."""
    texts: list[Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda _unet, args: texts.append(args[2][1]))
    with apply_layout(pipe, prompt, [(phrase, BOX)]):
        latents(pipe, prompt, steps=1)
    handle.remove()
    return texts[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("a red cat on the left", "red cat"),
        ("a catfish and a cat", "cat"),
        ("a fish, not a catfish", "fish"),
        ("a dog,cat", "cat"),
        ("a (cat) and a dog", "cat"),
        ("a cat, a dog.", "dog"),
        ("dog", "dog"),
        ("a dog2 on the cat", "dog"),
        ("a cat-fish", "fish"),
    ],
)
def test_whole_words_are_found_in_the_ids_of_the_call(
    kind: str, prompt: str, phrase: str, seen: list
) -> None:
    pipe = with_tokenizer(KINDS[kind]())
    assert painted(pipe, prompt, [(phrase, BOX)], seen) == [phrase]


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_place_of_a_phrase_that_begins_another_word(kind: str, seen: list) -> None:
    """The last of the words, counted from the end of what the tokenizer makes of them."""
    pipe, prompt = with_tokenizer(KINDS[kind]()), "a catfish and a cat"
    painted(pipe, prompt, [("cat", BOX)], seen)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=TOKENS).input_ids
    text = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    start = next(i for i in range(TOKENS) if ids[i : i + len(text)] == text)
    last = start + len(text) - 1
    assert seen[0][0].nonzero().flatten().tolist() == [last]


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [("a catfish", "cat"), ("dogs", "dog"), ("35 dogs", "3"), ("une cafe\u0301", "cafe"), ("a café", "caf"),
     ("a café", "cafe"), ("Katzen", "Katze"), ("a 👍🏽", "👍"), ("a catfish", "cat fish"),
     ("a \ufb01re", "ire")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_part_of_a_word_is_no_phrase(kind: str, prompt: str, phrase: str) -> None:
    sentence = f"have a phrase of the prompt {prompt!r}, got {phrase!r}"
    with pytest.raises(ValueError, match=sentence):
        apply_layout(with_tokenizer(KINDS[kind]()), prompt, [(phrase, BOX)]).__enter__()


def test_letters_that_a_tokenizer_does_not_tell_apart(seen: list) -> None:
    """CLIP has small letters alone and one kind of space; é is one letter or two."""
    pipe = with_tokenizer(KINDS["clip"]())
    assert painted(pipe, "Red  CAT on a red cat", [("red cat", BOX)], seen) == ["red cat"]
    assert seen[0][0].nonzero().flatten().tolist() == [1, 2]
    assert painted(pipe, "a red cat", [("RED\tCat", BOX)], seen) == ["red cat"]
    assert painted(pipe, "une cafe\u0301 au lait", [("café", BOX)], seen) == ["café"]
    with pytest.raises(ValueError, match="have a phrase of the prompt 'a Dog'"):
        apply_layout(with_tokenizer(KINDS["t5"]()), "a Dog", [("dog", BOX)]).__enter__()


@pytest.mark.parametrize(
    ("prompt", "phrase"), [("a cat , dog", "cat, dog"), ("a (cat)", "( cat )"), ("2dogs", "2 dogs")]
)
def test_spaces_that_a_tokenizer_does_not_tell(prompt: str, phrase: str, seen: list) -> None:
    found = painted(with_tokenizer(KINDS["clip"]()), prompt, [(phrase, BOX)], seen)
    assert found[0].replace(" ", "") == phrase.replace(" ", "")
    with pytest.raises(ValueError, match="have a phrase of the prompt"):
        apply_layout(with_tokenizer(KINDS["t5"]()), prompt, [(phrase, BOX)]).__enter__()


@pytest.mark.parametrize(
    ("kind", "tokens"), [("t5", "红猫"), ("glm", "红 猫在"), ("clip", "一只红猫在左边")]
)
def test_scripts_without_spaces(kind: str, tokens: str, seen: list) -> None:
    """Words stand beside each other; a token that is of more than the phrase carries the phrase
    too.
    """
    found = painted(with_tokenizer(KINDS[kind]()), "一只红猫在左边", [("红猫", BOX)], seen)
    assert found[0].replace(" ", "") == tokens.replace(" ", "")


def test_characters_of_a_slow_tokenizer() -> None:
    """What decodes to nothing known gets what lies between its neighbours, a space's own token
    nothing.
    """
    text = "a ü é, cat"
    tokens = tokens_of(KINDS["glm"](), text)
    read = [place and text[slice(*place)] for place in tokens.chars]
    assert read == [None, None, "a", "", "ü", "", "é", ",", "cat"]
    assert tokens_of(KINDS["glm"](), "a fish").of((2, 6)) == (3, 5)  # "▁" and "fish"
    assert tokens_of(KINDS["glm"](), text, 6).chars == tokens.chars[:6]
    assert tokens_of(KINDS["glm"](), text, 12).chars == [None] * 3 + tokens.chars


def test_phrases_of_signs(seen: list) -> None:
    pipe = with_tokenizer(KINDS["clip"]())
    assert painted(pipe, 'a "cat" (dog)', [('"cat"', BOX), ("(", OTHER)], seen) == ['" cat "', "("]
    assert painted(pipe, "a \u00a8 cat", [("\u00a8", BOX)], seen) == ["\u00a8"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_place_of_a_phrase(kind: str, seen: list) -> None:
    pipe, prompt = with_tokenizer(KINDS[kind]()), "a cat on the red cat"
    places = []
    for phrase in (
        "cat",
        Phrase("cat"),
        Phrase("cat", occurrence=2),
        Phrase(span=(17, 20)),
        Phrase(span=[2, 5]),
    ):
        assert painted(pipe, prompt, [(phrase, BOX)], seen) == ["cat"]
        places.append(seen[0][0].nonzero().flatten().tolist())
    assert places[0] == places[1] == places[4]
    assert places[2] == places[3] != places[0]
    assert painted(pipe, prompt, [(Phrase("cat", occurrence=2), BOX), ("cat", OTHER)], seen) == [
        "cat",
        "cat",
    ]


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({}, TypeError, "text must be a string where no span is given, got NoneType"),
        ({"text": 3}, TypeError, "text must be a string where no span is given, got int"),
        ({"text": "cat", "occurrence": 0}, ValueError, "occurrence must be at least 1, got 0"),
        (
            {"text": "cat", "occurrence": True},
            TypeError,
            "occurrence must be a whole number, got bool",
        ),
        (
            {"text": "cat", "occurrence": 1.5},
            TypeError,
            "occurrence must be a whole number, got float",
        ),
        ({"text": "cat", "span": (0, 3)}, ValueError, "span must stand in the place of a text"),
        ({"span": (0, 3), "occurrence": 2}, ValueError, "span must stand in the place of a text"),
        ({"span": (3, 3)}, ValueError, r"span must have 0 <= start < stop, got \(3, 3\)"),
        ({"span": (-1, 3)}, ValueError, r"span must have 0 <= start < stop, got \(-1, 3\)"),
        ({"span": (0, 3, 4)}, TypeError, r"span must be two whole numbers \(start, stop\)"),
        ({"span": "ab"}, TypeError, r"span must be two whole numbers \(start, stop\)"),
        ({"span": (0.0, 3.0)}, TypeError, r"span must be two whole numbers \(start, stop\)"),
    ],
)
def test_wrong_phrases_are_refused(arguments: dict, kind: type, sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        Phrase(**arguments)


@pytest.mark.parametrize(
    ("phrase", "sentence"),
    [
        (
            Phrase("cat", occurrence=2),
            r"regions\[0\] must have a phrase of the prompt 'a cat dog', got occurrence 2 of",
        ),
        (
            Phrase(span=(2, 12)),
            r"regions\[0\] must have a span in the 9 characters of its prompt, got \(2, 12\)",
        ),
        (Phrase(span=(1, 2)), r"regions\[0\] must have a phrase of at least one token, got ' '"),
        (" ", r"regions\[0\] must have a phrase of at least one token, got ' '"),
    ],
)
def test_phrases_that_are_not_in_the_prompt(phrase: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        apply_layout(pipeline("sd"), PROMPT, [(phrase, BOX)]).__enter__()


def test_a_region_without_a_token_of_its_own_is_told(seen: list) -> None:
    """A later region takes tokens that both name; what is left of one is enough."""
    pipe = pipeline("sd")
    sentence = r"regions\[0\] has no token of its own: later regions take all of 'cat'"
    with (
        pytest.warns(UserWarning, match=sentence) as told,
        apply_layout(pipe, PROMPT, [("cat", BOX), ("cat", OTHER)]),
    ):
        latents(pipe)
    assert [warning.filename for warning in told] == [__file__]
    assert set(seen[-1][0].tolist()) == {0, 2}
    with pytest.warns(UserWarning, match=r"regions\[1\]\[0\] has no token"):
        apply_layout(pipe, [PROMPT] * 2, [REGIONS, [("cat", BOX), ("cat dog", OTHER)]]).__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_layout(pipe, PROMPT, [("cat dog", BOX), ("cat", OTHER), (None, BOX)]).__enter__()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phrase", ["red cat", "dog"])
def test_a_phrase_gets_the_embeddings_that_it_has_alone(kind: str, phrase: str) -> None:
    """The rows of the U-Net's text are, token by token, those of a prompt that is the phrase."""
    pipe, prompt = with_tokenizer(KINDS[kind]()), "a red cat on the dog"
    given, alone = text_of(pipe, prompt, phrase), pipe.encode_prompt(phrase, "cpu", 1, False)[0][0]
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
    """After a bracket T5's word has no mark: its letters get what stands for them in the phrase
    alone.
    """
    pipe = with_tokenizer(KINDS["glm"]())
    given = text_of(pipe, "a (dogs", "dogs")
    dog, s = pipe.encode_prompt("dogs", "cpu", 1, False)[0][0][-2:]  # "▁dog" and "s"
    assert pipe.tokenizer.convert_ids_to_tokens(pipe.tokenizer("a (dogs").input_ids)[-4:] == [
        "d",
        "o",
        "g",
        "s",
    ]
    assert torch.equal(given[-4:], torch.stack([dog, dog, dog, s]))


def test_padding_on_the_left_follows_the_length_of_the_call(seen: list) -> None:
    """FLUX is called with 24 tokens, or 28: the place is counted from the end."""
    pipe = tiny_pipeline(diffusers.FluxPipeline)
    pipe.tokenizer_2.padding_side = "left"
    for size in (24, 28):
        seen.clear()
        with apply_layout(pipe, PROMPT, [("dog", BOX)]):
            latents(pipe, max_sequence_length=size)
        ids = pipe.tokenizer_2(PROMPT, padding="max_length", max_length=size).input_ids
        start = len(ids) - 5  # _ d o g </s>
        assert seen[0][0, :size].nonzero().flatten().tolist() == list(range(start, start + 4))


def test_a_learned_word_of_several_tokens(seen: list) -> None:
    """Textual inversion writes the word out before the tokenizer reads it; spans count the user's
    own characters.
    """
    pipe = with_tokenizer(KINDS["clip"]())
    pipe.tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2"])
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    prompt, places = "a <toy> on a red cat", []
    for phrase in ("<toy>", Phrase(span=(2, 7)), "red cat", Phrase(span=(13, 20))):
        seen.clear()
        with apply_layout(pipe, prompt, [(phrase, BOX)], self_weight=0):
            latents(pipe, prompt, steps=1)
        places.append(seen[0][0].nonzero().flatten().tolist())
    ids = pipe.tokenizer(pipe.maybe_convert_prompt(prompt, pipe.tokenizer)).input_ids
    tokens = pipe.tokenizer.convert_ids_to_tokens(ids)
    assert [tokens[i] for i in places[0]] == ["<toy>", "<toy>_1", "<toy>_2"]
    assert "".join(tokens[i] for i in places[2]) == "red</w>cat</w>"
    assert places[0] == places[1]
    assert places[2] == places[3]
    with pytest.raises(ValueError, match="have a phrase that cuts no learned word, got 'to'"):
        apply_layout(pipe, prompt, [(Phrase(span=(3, 5)), BOX)]).__enter__()


def test_the_example_of_a_phrase() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(integration.Phrase, "Phrase")
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


class Kolors(torch.nn.Module):
    """A text encoder with ChatGLM's way of being called: hidden states [L, B, C], of which the last
    but one counts.
    """

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(num_tokens, 32)

    def forward(self, input_ids: Tensor, **_: object) -> object:
        states = self.embedding(input_ids).transpose(0, 1)
        return types.SimpleNamespace(hidden_states=[states, states])


def test_kolors_pads_on_the_left_to_the_length_of_its_own(
    seen: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 tokens, whatever the tokenizer's own limit is."""
    from diffusers.pipelines.kolors.pipeline_kolors import (
        KolorsPipeline,
    )  # diffusers' own name asks for sentencepiece

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
    assert seen[0].shape == (1, 256)
    assert seen[0][0].nonzero().flatten().tolist() == [255]


def with_positions(read: dict) -> dict:
    read["position_ids"] = read["attention_mask"]
    return read
