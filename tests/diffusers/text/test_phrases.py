"""Where phrases are found: what the ids of a call decode to there, with every kind of tokenizer."""

from __future__ import annotations

import doctest
import warnings

import pytest
import texts
import torch
from families import family, run
from pipelines import PROMPT, REGIONS, latents, pipeline
from texts import KINDS, TOKENS

from dense_attn.integrations import diffusers as integration
from dense_attn.integrations.diffusers import Phrase, apply_layout
from dense_attn.integrations.diffusers.regions import parse
from dense_attn.integrations.diffusers.text.reading import Reading
from dense_attn.integrations.diffusers.text.tokens import tokens_of

pytestmark = pytest.mark.usefixtures("one_thread")
BOX = (0.0, 0.0, 0.5, 1.0)
OTHER = (0.5, 0.0, 1.0, 1.0)


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
    kind: str, prompt: str, phrase: str, calls: list
) -> None:
    pipe = texts.with_tokenizer(KINDS[kind]())
    assert texts.painted(pipe, prompt, [(phrase, BOX)], calls) == [phrase]


@pytest.mark.parametrize("name", ["qwen", "hunyuan_image"])
@pytest.mark.parametrize(("prompt", "start"), [("dog", 0), ("  dog", 0), ("a dog", 1)])
def test_a_phrase_behind_a_templates_space(name: str, prompt: str, start: int) -> None:
    """The line's end before a prompt is the template's; spaces of its own are the phrase's."""
    pipe = family(name)
    found = Reading(pipe, [prompt], parse([("dog", BOX)], 1), encode=True)
    (place,) = found.places(0)[0]
    assert place[:2] == (start, len(prompt))
    with apply_layout(pipe, prompt, [("dog", BOX)]):
        run(name, prompt, steps=1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_place_of_a_phrase_that_begins_another_word(kind: str, calls: list) -> None:
    """The last of the words, counted from the end of what the tokenizer makes of them."""
    pipe, prompt = texts.with_tokenizer(KINDS[kind]()), "a catfish and a cat"
    texts.painted(pipe, prompt, [("cat", BOX)], calls)
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=TOKENS).input_ids
    text = pipe.tokenizer(prompt, add_special_tokens=False).input_ids
    start = next(i for i in range(TOKENS) if ids[i : i + len(text)] == text)
    last = start + len(text) - 1
    assert calls[0][4][0].nonzero().flatten().tolist() == [last]


@pytest.mark.parametrize(
    ("prompt", "phrase"),
    [
        ("a catfish", "cat"),
        ("dogs", "dog"),
        ("35 dogs", "3"),
        ("une cafe\u0301", "cafe"),
        ("a café", "caf"),
        ("a café", "cafe"),
        ("Katzen", "Katze"),
        ("a 👍🏽", "👍"),
        ("a catfish", "cat fish"),
        ("a \ufb01re", "ire"),
    ],
)
@pytest.mark.parametrize("kind", ["clip", "t5"])
def test_a_part_of_a_word_is_no_phrase(kind: str, prompt: str, phrase: str) -> None:
    sentence = f"have a phrase of the prompt {prompt!r}, got {phrase!r}"
    with pytest.raises(ValueError, match=sentence):
        apply_layout(texts.with_tokenizer(KINDS[kind]()), prompt, [(phrase, BOX)]).__enter__()


def test_letters_that_a_tokenizer_does_not_tell_apart(calls: list) -> None:
    """CLIP has small letters alone and one kind of space; é is one letter or two."""
    pipe = texts.with_tokenizer(KINDS["clip"]())
    assert texts.painted(pipe, "Red  CAT on a red cat", [("red cat", BOX)], calls) == ["red cat"]
    assert calls[0][4][0].nonzero().flatten().tolist() == [1, 2]
    assert texts.painted(pipe, "a red cat", [("RED\tCat", BOX)], calls) == ["red cat"]
    assert texts.painted(pipe, "une cafe\u0301 au lait", [("café", BOX)], calls) == ["café"]
    with pytest.raises(ValueError, match="have a phrase of the prompt 'a Dog'"):
        apply_layout(texts.with_tokenizer(KINDS["t5"]()), "a Dog", [("dog", BOX)]).__enter__()


@pytest.mark.parametrize(
    ("prompt", "phrase"), [("a cat , dog", "cat, dog"), ("a (cat)", "( cat )"), ("2dogs", "2 dogs")]
)
def test_spaces_that_a_tokenizer_does_not_tell(prompt: str, phrase: str, calls: list) -> None:
    found = texts.painted(texts.with_tokenizer(KINDS["clip"]()), prompt, [(phrase, BOX)], calls)
    assert found[0].replace(" ", "") == phrase.replace(" ", "")
    with pytest.raises(ValueError, match="have a phrase of the prompt"):
        apply_layout(texts.with_tokenizer(KINDS["t5"]()), prompt, [(phrase, BOX)]).__enter__()


@pytest.mark.parametrize(
    ("kind", "tokens"), [("t5", "红猫"), ("glm", "红 猫在"), ("clip", "一只红猫在左边")]
)
def test_scripts_without_spaces(kind: str, tokens: str, calls: list) -> None:
    """Words stand beside each other; a token of more than the phrase carries the phrase too."""
    found = texts.painted(
        texts.with_tokenizer(KINDS[kind]()), "一只红猫在左边", [("红猫", BOX)], calls
    )
    assert found[0].replace(" ", "") == tokens.replace(" ", "")


def test_characters_of_a_slow_tokenizer() -> None:
    """A token of nothing known gets what lies between its neighbours, a space's own nothing."""
    text = "a ü é, cat"
    tokens = tokens_of(KINDS["glm"](), text)
    read = [place and text[slice(*place)] for place in tokens.chars]
    assert read == [None, None, "a", "", "ü", "", "é", ",", "cat"]
    assert tokens_of(KINDS["glm"](), "a fish").of((2, 6)) == (3, 5)  # "▁" and "fish"
    assert tokens_of(KINDS["glm"](), text, 6).chars == tokens.chars[:6]
    assert tokens_of(KINDS["glm"](), text, 12).chars == [None] * 3 + tokens.chars


def test_phrases_of_signs(calls: list) -> None:
    pipe = texts.with_tokenizer(KINDS["clip"]())
    assert texts.painted(pipe, 'a "cat" (dog)', [('"cat"', BOX), ("(", OTHER)], calls) == [
        '" cat "',
        "(",
    ]
    assert texts.painted(pipe, "a \u00a8 cat", [("\u00a8", BOX)], calls) == ["\u00a8"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_place_of_a_phrase(kind: str, calls: list) -> None:
    pipe, prompt = texts.with_tokenizer(KINDS[kind]()), "a cat on the red cat"
    places = []
    for phrase in (
        "cat",
        Phrase("cat"),
        Phrase("cat", occurrence=2),
        Phrase(span=(17, 20)),
        Phrase(span=[2, 5]),
    ):
        assert texts.painted(pipe, prompt, [(phrase, BOX)], calls) == ["cat"]
        places.append(calls[0][4][0].nonzero().flatten().tolist())
    assert places[0] == places[1] == places[4]
    assert places[2] == places[3] != places[0]
    assert texts.painted(
        pipe, prompt, [(Phrase("cat", occurrence=2), BOX), ("cat", OTHER)], calls
    ) == [
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


def test_a_region_without_a_token_of_its_own_is_told(calls: list) -> None:
    """A later region takes tokens that both name; what is left of one is enough."""
    pipe = pipeline("sd")
    sentence = r"regions\[0\] has no token of its own: later regions take all of 'cat'"
    with (
        pytest.warns(UserWarning, match=sentence) as told,
        apply_layout(pipe, PROMPT, [("cat", BOX), ("cat", OTHER)]),
    ):
        latents(pipe)
    assert [warning.filename for warning in told] == [__file__]
    assert set(calls[-1][4][0].tolist()) == {0, 2}
    with pytest.warns(UserWarning, match=r"regions\[1\]\[0\] has no token"):
        apply_layout(pipe, [PROMPT] * 2, [REGIONS, [("cat", BOX), ("cat dog", OTHER)]]).__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_layout(pipe, PROMPT, [("cat dog", BOX), ("cat", OTHER), (None, BOX)]).__enter__()


def test_the_example_of_a_phrase() -> None:
    (example,) = doctest.DocTestFinder(recurse=False).find(integration.Phrase, "Phrase")
    assert example.examples
    assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize("name", ["qwen", "z_image"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_that_a_pipeline_takes_out(
    name: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phrase of the shorter prompt stands where a word's letters change the embeddings."""
    pipe, longer = family(name), "a dog in fog cat"
    monkeypatch.setattr(pipe.tokenizer, "padding_side", side)
    with torch.no_grad():
        texts = [pipe.encode_prompt(prompt=[text, longer])[0] for text in ("a cat", "a cot")]
    reading = Reading(pipe, ["a cat", longer], parse([("cat", (0.0, 0.0, 0.5, 1.0))], 2), False)
    ((start, _),) = reading.images(max(map(len, texts[0])))[0].spans[0]
    size = min(map(len, (texts[0][0], texts[1][0])))
    changed = (texts[0][0][:size] - texts[1][0][:size]).abs().amax(1) > 1e-6
    assert start + 2 == changed.nonzero()[0]  # behind the space and the first letter
