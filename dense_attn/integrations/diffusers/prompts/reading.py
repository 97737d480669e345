"""The prompts of regions, encoded as the pipeline encodes its own."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .. import regions as phrase_regions
from ..modular.pipeline import Modular
from ..text import encoding
from ..text.reading import Reading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .region import Regions


class Text(NamedTuple):
    """One text as it is encoded."""

    tokens: Tensor  # [L, C], with its padding
    mask: Tensor | None  # bool [L], the tokens that are no padding, where the pipeline tells
    bare: Tensor  # [n, C], without padding
    second: Text | None = None  # as another encoder reads it, of those whose padding has a mask


class RegionReading(Reading):
    """The prompts of one block: the call's, and those of the regions.

    `as_long`: whether padding makes a region's text as long as a call's own embeddings.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        prompts: list[str] | None,
        regions: list[Regions],
        as_long: bool = False,
    ) -> None:
        self.as_long = as_long
        given = [""] * len(regions) if prompts is None else prompts
        self.images_of = regions * len(given) if len(regions) == 1 else regions
        self.base = prompts is not None
        self.negatives = any(text is not None for image in regions for text in image.negatives)
        self._manner: dict[str, Any] = {}  # of encode_prompt, as the last call had it
        self._texts: dict[tuple[str, bool], Text] = {}  # prompts and negative ones, in that manner
        none = phrase_regions.Regions([], torch.zeros(0, 1, 1, dtype=torch.bool, device="cpu"))
        super().__init__(pipe, given, [none], encode=False)
        if not self.base:
            self.segments = []  # a call may have any prompt

    def hear(self, given: dict[str, Any]) -> None:
        """Take the arguments of a call of encode_prompt, and encode the regions' texts likewise."""
        embedded = given.get("prompt_embeds") is not None
        # it comes after the prompt, with no manner to tell
        negative = bool(self._heard) and embedded
        super().hear(given)
        if not negative and encoding.missing(self.pipe) is None:
            manner = encoding.manner_of(given)
            if embedded:  # of others only this one had an effect
                manner = {name: manner[name] for name in manner if name == "lora_scale"}
                manner |= self._length_of(given["prompt_embeds"])
            if not encoding.same_manner(manner, self._manner):
                self._manner = manner
                self._texts.clear()
            for positive in (True, False):  # now, while the text encoders are at hand
                self.texts(positive)

    def _length_of(self, embeddings: Any) -> dict[str, Any]:
        """The option of texts as long as a caller's own embeddings, where padding makes them so."""
        last = self.segments[-1] if self.segments else None
        pads = last is not None and last.padded and last.others is None
        return self.length_of(embeddings) if self.as_long and pads else {}

    def texts(self, positive: bool) -> list[list[Text | None]]:
        """The texts of each image's regions; None for the negative prompt's own."""
        return [
            [None if text is None else self._text(text, positive) for text in texts]
            for texts in self._own(positive)
        ]

    def given(self, positive: bool) -> list[list[bool]]:
        """Whether each image's regions have a prompt, or a negative one."""
        return [[text is not None for text in texts] for texts in self._own(positive)]

    def _own(self, positive: bool) -> list[list[str | None]]:
        return [image.prompts if positive else image.negatives for image in self.images_of]

    def _text(self, text: str, positive: bool) -> Text:
        """A prompt, or a negative one, as the last call's manner encodes it."""
        key = text, positive
        if key not in self._texts:
            found = self._encoded(text) if positive else self._negative(text)
            same = 1, len(found[0][0])
            masks = (x for x in found[1:] if isinstance(x, Tensor) and x.shape == same)
            pairs = (pair for pair in pairwise(found[1:]) if _is_masked(*pair))
            second = next((_text(*map(_first, pair)) for pair in pairs), None)
            own = _text(found[0][0], _first(next(masks, None)))
            self._texts[key] = own._replace(second=second)
        return self._texts[key]

    def _encoded(self, text: str, **options: Any) -> tuple[Any, ...]:
        return encoding.encode(self.pipe, text, **self._manner, **options)

    def _negative(self, text: str) -> tuple[Any, ...]:
        """The outputs of encode_prompt that it has for guidance alone, if it has any.

        Modular pipelines encode negative prompts as they do prompts.
        """
        if isinstance(self.pipe, Modular) or not encoding.takes(self.pipe, "negative_prompt"):
            return self._encoded(text)
        guided = {"negative_prompt": text, "do_classifier_free_guidance": True}
        pairs = zip(self._encoded(""), self._encoded("", **guided))
        return tuple(more for one, more in pairs if one is None or len(one) == 0)


def _first(row: Tensor | None) -> Tensor | None:
    """The one row of a batch."""
    return None if row is None else row[0]


def _text(tokens: Tensor, mask: Tensor | None) -> Text:
    """A text of an encoder's tokens [L, C] and their mask [L]."""
    if mask is None:
        return Text(tokens, None, tokens)
    return Text(tokens, mask.bool(), tokens[mask.bool().to(tokens.device)])


def _is_masked(tokens: Any, mask: Any) -> bool:
    """Whether two outputs of encode_prompt are the tokens of an encoder and their mask."""
    both = isinstance(tokens, Tensor) and isinstance(mask, Tensor)
    return both and tokens.dim() == 3 and mask.shape == tokens.shape[:2]
