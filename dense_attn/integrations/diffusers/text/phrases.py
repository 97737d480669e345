"""The places of a prompt's phrases, in its characters and among a pipeline's text tokens."""

from __future__ import annotations

import inspect
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dense_attn import _checks

from .segments import Segment
from .tokens import Span, Tokens, folded, tokens_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# the scripts, by their letters' names, in which words stand beside each other or take endings
WITHOUT_SPACES = (
    "CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO", "HANGUL",
    "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN", "YI",
)  # fmt: skip
JOINER = "\u200d"  # makes one sign of several
TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"  # of the skin of the sign before


@dataclass(frozen=True)
class Phrase:
    """A part of a prompt that its words alone do not name: one of several places, or characters.

    Args:
        text: the phrase's words, as they stand in the prompt.
        occurrence: which of the places where the text stands, counted from 1.
        span: the first character, from 0, and the one after the last, (start, stop), in the place
            of a text.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import Phrase, apply_layout
        >>> pipe, prompt = tiny_pipeline(StableDiffusionPipeline), "a cat on a cat"
        >>> upper = (Phrase(span=(2, 5)), (0.0, 0.0, 1.0, 0.5))
        >>> lower = (Phrase("cat", occurrence=2), (0.0, 0.5, 1.0, 1.0))
        >>> with apply_layout(pipe, prompt, [upper, lower]):
        ...     image = pipe(prompt, num_inference_steps=4).images[0]
    """

    text: str | None = None
    occurrence: int = 1
    span: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) and (self.text is not None or self.span is None):
            _checks.refuse(
                "text", "be a string where no span is given", type(self.text).__name__, TypeError
            )
        if not _is_whole(self.occurrence):
            _checks.refuse(
                "occurrence", "be a whole number", type(self.occurrence).__name__, TypeError
            )
        if self.occurrence < 1:
            _checks.refuse("occurrence", "be at least 1", self.occurrence)
        if self.span is None:
            return
        if self.text is not None or self.occurrence != 1:
            _checks.refuse("span", "stand in the place of a text and its occurrence", self.span)
        pair = isinstance(self.span, (tuple, list)) and len(self.span) == 2
        if not pair or not all(map(_is_whole, self.span)):
            _checks.refuse("span", "be two whole numbers (start, stop)", repr(self.span), TypeError)
        if not 0 <= self.span[0] < self.span[1]:
            _checks.refuse("span", "have 0 <= start < stop", self.span)
        object.__setattr__(self, "span", tuple(self.span))


class Place(NamedTuple):
    """The tokens of a phrase in one segment."""

    start: int  # in the denoiser's text tokens, as the other
    stop: int
    tokens: Tokens  # of the segment, which say what each is
    chars: Span  # in the text of the tokens
    needed: int  # tokens of the denoiser that hold the phrase


def characters(found: list[Segment], prompt: str, phrase: Phrase, argument: str) -> Span:
    """The stretch of a prompt that a phrase names: whole words, whatever stands beside them."""
    if phrase.span is not None:
        if phrase.span[1] > len(prompt):
            _checks.refuse(
                argument, f"have a span in the {len(prompt)} characters of its prompt", phrase.span
            )
        return phrase.span
    if not phrase.text.strip():
        _checks.refuse(argument, "have a phrase of at least one token", repr(phrase.text))
    tokenizers = [tokenizer for segment in found for tokenizer in segment.tokenizers]
    caseless = all(
        _reads_small(tokenizer, text) for tokenizer in tokenizers for text in (prompt, phrase.text)
    )
    places = list(_places(prompt, phrase.text, caseless))
    if not places:  # spaces that tokenizers do not tell, as CLIP's of those beside a comma
        ids = [tokens_of(tokenizer, phrase.text).ids for tokenizer in tokenizers]
        places = [
            place
            for place in _places(prompt, phrase.text, caseless, spaces=False)
            if [tokens_of(tokenizer, prompt[slice(*place)]).ids for tokenizer in tokenizers] == ids
        ]
    if not places:
        _checks.refuse(argument, f"have a phrase of the prompt {prompt!r}", repr(phrase.text))
    if phrase.occurrence > len(places):
        got = f"occurrence {phrase.occurrence} of {phrase.text!r}"
        got += f", which stands there {len(places)} times"
        _checks.refuse(argument, f"have a phrase of the prompt {prompt!r}", got)
    return places[phrase.occurrence - 1]


def place_of(
    pipe: DiffusionPipeline,
    segment: Segment,
    prompt: str,
    chars: Span,
    num_tokens: int | None,
    argument: str,
    batch: Sequence[str],
) -> Place | None:
    """The tokens of a stretch of characters among num_tokens; None past what a tokenizer keeps.

    `batch`: the prompts that are encoded at once, this one among them.
    """
    found = []
    for tokenizer in segment.tokenizers:
        length, shift = segment.room(tokenizer, batch, num_tokens)
        text, inner = _converted(pipe, tokenizer, prompt, chars, argument)
        before, text = segment.template.rindex("{}"), segment.around(text)
        inner = inner[0] + before, inner[1] + before
        whole = tokens_of(tokenizer, text)._replace(begin=before).of(inner)
        if whole is None:
            _checks.refuse(
                argument, "have a phrase of at least one token", repr(prompt[slice(*chars)])
            )
        kept = Tokens(text, [], [])
        if length > 0:
            kept = tokens_of(tokenizer, text, length, segment.padded)._replace(begin=before)
        place = kept.of(inner)
        cut = place is None or place[1] - place[0] != whole[1] - whole[0]
        start, stop = (0, 0) if cut else place
        ends = shift + start, shift + stop
        found.append(None if cut else Place(*ends, kept, inner, shift + whole[1]))
    if len({place and place[:2] for place in found}) > 1:
        places = {place and place[:2] for place in found}
        got = f"{prompt[slice(*chars)]!r} at {places}"
        _checks.refuse(argument, "have a phrase that both tokenizers find in one place", got)
    return found[0]


def matched(place: Place, alone: Place) -> list[int]:
    """The token of a phrase alone that stands for each of its tokens in a prompt, by characters."""
    ours, theirs = (range(*one.tokens.of(one.chars)) for one in (place, alone))
    if len(ours) == len(theirs):
        return list(range(alone.start, alone.stop))
    shift, offset = alone.chars[0] - place.chars[0], alone.start - theirs[0]

    def likeness(i: int, j: int) -> tuple[int, bool]:
        (start, stop), (first, last) = place.tokens.chars[i], alone.tokens.chars[j]
        common = min(stop + shift, last) - max(start + shift, first)
        return common, place.tokens.ids[i] == alone.tokens.ids[j]

    return [offset + max(theirs, key=lambda j: likeness(i, j)) for i in ours]


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _reads_small(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer reads a text as if it had small letters alone."""
    small = text.lower()
    return small == text or tokens_of(tokenizer, small).ids == tokens_of(tokenizer, text).ids


def _places(prompt: str, phrase: str, caseless: bool, spaces: bool = True) -> Iterator[Span]:
    """The places of a phrase in a prompt, one after the other, with or without spaces."""
    text, wanted = folded(prompt, caseless), folded(phrase, caseless).letters.strip()
    if not spaces:
        text, wanted = text.joined(), wanted.replace(" ", "")
    begin = 0
    while (begin := text.letters.find(wanted, begin)) >= 0:
        end = begin + len(wanted)
        start, stop = text.places[begin], text.places[end - 1] + 1
        before, after = text.places[max(begin - 1, 0) : begin], text.places[end : end + 1]
        cut = before == [start] or after == [stop - 1]
        if cut or _in_a_word(prompt, start) or _in_a_word(prompt, stop):
            begin += 1
        else:
            yield start, stop
            begin = end


def _in_a_word(text: str, place: int) -> bool:
    """Whether what stands before a place and after it are of one word, one number or one sign."""
    if not 0 < place < len(text):
        return False
    left, right = text[place - 1], text[place]
    if unicodedata.category(right)[0] == "M" or JOINER in (left, right) or right in TONES:
        return True
    kinds = unicodedata.category(left)[0], unicodedata.category(right)[0]
    if kinds == ("N", "N"):
        return True
    if kinds[0] not in "LM" or kinds[1] != "L":
        return False
    return not any(
        unicodedata.name(letter, "").startswith(WITHOUT_SPACES) for letter in (left, right)
    )


def _converted(
    pipe: DiffusionPipeline, tokenizer: Any, prompt: str, chars: Span, argument: str
) -> tuple[str, Span]:
    """The prompt as its tokenizer gets it, in small letters or with learned words as tokens, and
    the place of the characters there.
    """
    if hasattr(pipe, "_text_preprocessing"):
        return _small(pipe, prompt, chars, argument)
    if not hasattr(pipe, "maybe_convert_prompt"):
        _check_clean(pipe, tokenizer, prompt, argument)
        return prompt, chars
    parts = prompt[: chars[0]], prompt[slice(*chars)], prompt[chars[1] :]
    before, inner, after = (pipe.maybe_convert_prompt(part, tokenizer) for part in parts)
    text = pipe.maybe_convert_prompt(prompt, tokenizer)
    if before + inner + after != text:
        _checks.refuse(
            argument, "have a phrase that cuts no learned word", repr(prompt[slice(*chars)])
        )
    return text, (len(before), len(before) + len(inner))


def _check_clean(pipe: DiffusionPipeline, tokenizer: Any, prompt: str, argument: str) -> None:
    """Refuse a prompt that a pipeline cleans to other tokens, as Wan's and FLUX.2's do."""
    module = inspect.unwrap(type(pipe).encode_prompt).__globals__
    cleaned = module.get("prompt_clean", str)(prompt)
    if hasattr(pipe, "system_message"):
        cleaned = cleaned.replace("[IMG]", "")
    texts = cleaned, prompt
    if cleaned != prompt and len({tuple(tokens_of(tokenizer, text).ids) for text in texts}) > 1:
        rule = "have a phrase of a prompt that the pipeline leaves as it is"
        _checks.refuse(argument, rule, f"{prompt!r}, which becomes {cleaned!r}")


def _small(pipe: DiffusionPipeline, prompt: str, chars: Span, argument: str) -> tuple[str, Span]:
    """The prompt in small letters without the spaces around it, and the place of characters."""
    from diffusers import utils

    text = prompt.lower()
    if len(text) != len(prompt):
        rule = "have a phrase of a prompt that small letters leave as long"
        _checks.refuse(argument, rule, repr(prompt[slice(*chars)]))
    before, text = len(text) - len(text.lstrip()), text.strip()
    if utils.is_bs4_available() and utils.is_ftfy_available():  # or no pipeline cleans
        cleaned = pipe._clean_caption(pipe._clean_caption(prompt)).strip()
        if cleaned.lower() != text:
            rule = "have a phrase of a prompt that clean_caption leaves as it is"
            _checks.refuse(argument, rule, f"{prompt!r}, which becomes {cleaned!r}")
    start, stop = (min(max(place - before, 0), len(text)) for place in chars)
    return text, (start, stop)
