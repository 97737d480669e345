"""The characters of a text that each token stands for, in the ids that a network is given."""

from __future__ import annotations

import re
import unicodedata
from difflib import SequenceMatcher
from typing import Any, NamedTuple

WHOLE = 2**20  # more tokens than any prompt has; a tokenizer's own limit would warn

Span = tuple[int, int]  # the first, and the one after the last


class Tokens(NamedTuple):
    """The ids of a text, and the characters that each of them stands for."""

    text: str
    ids: list[int]
    chars: list[Span | None]  # None: special tokens and padding
    begin: int = 0  # of the prompt in the text, behind what a template has before it

    def of(self, chars: Span) -> Span | None:
        """The tokens of a stretch of characters, with a space's own before them."""
        inside = [
            i
            for i, place in enumerate(self.chars)
            if place and _meet(_trimmed(self.text, place), chars)
        ]
        if not inside:
            return None
        start = inside[0]
        while start and self._is_space(self.chars[start - 1]):
            start -= 1
        return start, inside[-1] + 1

    def _is_space(self, chars: Span | None) -> bool:
        """Whether a token is of the prompt's spaces alone; a template's stay the template's."""
        return chars is not None and chars[0] >= self.begin and not self.text[slice(*chars)].strip()


class Folded(NamedTuple):
    """A text in the form in which texts are compared, and the place that each letter is from."""

    letters: str
    places: list[int]

    def joined(self) -> Folded:
        """The text without its spaces."""
        kept = [(letter, place) for letter, place in zip(*self) if letter != " "]
        return Folded("".join(letter for letter, _ in kept), [place for _, place in kept])


def folded(text: str, lower: bool) -> Folded:
    """Unicode's compatible decomposition, with single spaces, in small letters if asked."""
    letters: list[str] = []
    places: list[int] = []
    for i, character in enumerate(text):
        parts = unicodedata.normalize("NFKD", character.lower() if lower else character)
        if parts[:1] == " ":  # but for ¨, which is none
            parts = " " if character.isspace() else character
        for letter in parts:
            if letter.isspace() and letters and letters[-1] == " ":
                continue
            letters.append(" " if letter.isspace() else letter)
            places.append(i)
    return Folded("".join(letters), places)


def tokens_of(
    tokenizer: Any, text: str, num_tokens: int | None = None, padded: bool = True
) -> Tokens:
    """The tokens of a text, whole, or cut and, if asked, padded to the num_tokens of a network.

    Fast tokenizers say which characters a token is of; slow ones' tokens are aligned with the text.
    """
    size: dict[str, Any] = {"max_length": WHOLE}
    if num_tokens is not None:
        size = {"max_length": num_tokens, "padding": "max_length" if padded else False}
    if getattr(tokenizer, "is_fast", False):
        read = tokenizer(
            text,
            truncation=True,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            **size,
        )
        places = zip(read.offset_mapping, read.special_tokens_mask)
        return Tokens(
            text, read.input_ids, [None if special else tuple(place) for place, special in places]
        )
    ids = list(tokenizer(text, truncation=True, **size).input_ids)
    plain = list(
        tokenizer(text, add_special_tokens=False, truncation=True, max_length=WHOLE).input_ids
    )
    aligned, kept = (
        _aligned(tokenizer, text, plain),
        SequenceMatcher(None, plain, ids, autojunk=False),
    )
    first, at, length = kept.find_longest_match(0, len(plain), 0, len(ids))
    after = len(ids) - at - length
    return Tokens(text, ids, [None] * at + aligned[first : first + length] + [None] * after)


def _aligned(tokenizer: Any, text: str, ids: list[int]) -> list[Span | None]:
    """The characters of each id, by what it decodes to; unknown ones share what is left."""
    owners: list[int] = []
    letters: list[str] = []
    spaces: set[int] = set()
    for i, token in enumerate(tokenizer.convert_ids_to_tokens(ids)):
        known = ids[i] != tokenizer.unk_token_id
        surface = (
            folded(tokenizer.convert_tokens_to_string([token]), True).letters.replace(" ", "")
            if known
            else ""
        )
        owners += [i] * len(surface)
        letters.append(surface)
        spaces |= {i} if known and not surface else set()
    whole = folded(text, True).joined()
    matcher = SequenceMatcher(None, "".join(letters), whole.letters, autojunk=False)
    found: list[Span | None] = [None] * len(ids)
    for a, b, size in matcher.get_matching_blocks():
        for k in range(size):
            owner, place = owners[a + k], whole.places[b + k]
            start, stop = found[owner] or (place, place)
            found[owner] = min(start, place), max(stop, place + 1)
    return _filled(text, found, spaces)


def _filled(text: str, found: list[Span | None], spaces: set[int]) -> list[Span | None]:
    """The characters, with unknown tokens' too: a word each, or all between neighbours."""
    filled, i = list(found), 0
    while i < len(found):
        stop = next((j for j in range(i, len(found)) if found[j]), len(found))
        if stop > i:
            before = filled[i - 1][1] if i else 0
            after = found[stop][0] if stop < len(found) else len(text)
            words = [match.span() for match in re.finditer(r"\S+", text[before:after])]
            unknown = [j for j in range(i, stop) if j not in spaces]
            each = words if len(words) == len(unknown) else [(0, after - before)] * len(unknown)
            filled[i:stop] = [(before, before)] * (stop - i)  # a space's own
            for j, (first, last) in zip(unknown, each):
                filled[j] = before + first, before + last
        i = stop + 1
    return filled


def _trimmed(text: str, chars: Span) -> Span:
    """The characters without white space around them, which some tokenizers count to a token."""
    inner = text[slice(*chars)]
    return chars[0] + len(inner) - len(inner.lstrip()), chars[1] - len(inner) + len(inner.rstrip())


def _meet(a: Span, b: Span) -> bool:
    return max(a[0], b[0]) < min(a[1], b[1])
