"""A layout's reading of its prompts: each phrase's tokens in a call, and its embeddings alone."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

from ..state import Image
from . import encoding, phrases
from .same_prompt import other_prompt
from .segments import segments

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..regions import Regions
    from .phrases import Place
    from .tokens import Span


class Reading:
    """The prompts and regions of one `apply_layout` block.

    Args:
        pipe: the pipeline.
        prompts: one for each image.
        regions: one for each prompt, or one for all of them.
        encode: whether phrases get the embeddings that they have alone.
    """

    def __init__(
        self, pipe: DiffusionPipeline, prompts: list[str], regions: list[Regions], encode: bool
    ) -> None:
        self.pipe, self.prompts, self.encode = pipe, prompts, encode
        self.regions = regions * len(prompts) if len(regions) == 1 else regions
        self.shared = len(regions) == 1
        self.segments = segments(pipe)
        self.chars = [self._characters(b) for b in range(len(prompts))]
        self.options: dict[str, Any] = {}  # of encode_prompt, as the last call had them
        # the images of the last call, where encode_prompt puts them beside the prompt
        self.pictures: dict[str, Any] = {}
        self._waits = encoding.takes(pipe, "image")  # for them
        self._embeddings: dict[tuple, Tensor] = {}  # of a text under options
        self._images: dict[tuple, list[Image]] = {}  # of a number of tokens under options
        # what there is to say of each prompt since the denoiser's last call
        self._heard: list[str | None] = []
        self._said = False
        # texts of the call at hand, None where they are no prompt of the layout's
        self.rows: int | None = None
        self.guides = False  # as encode_prompt was told
        if encode and any(phrase for image in self.regions for phrase in image.phrases):
            lacking = encoding.missing(pipe)
            if lacking is not None:
                rule = f"be False for a pipeline without its {lacking}"
                _checks.refuse("encode_phrases", rule, True)
        if self._waits and len(prompts) > 1:
            rule = "be one prompt for a pipeline that encodes it with an image"
            _checks.refuse("prompt", rule, f"{len(prompts)} prompts")
        self.needed = self._needed()
        self._warn_of_lost()
        self.images()

    def images(self, num_tokens: int | None = None) -> list[Image]:
        """The regions of each prompt among num_tokens text tokens, None before they are known."""
        key = num_tokens, *self.options.items()
        if key not in self._images:
            self._images[key] = [self._image(b, num_tokens) for b in range(len(self.prompts))]
        return self._images[key]

    def hear(self, given: dict[str, Any]) -> None:
        """Take the arguments of an encode_prompt that must encode the prompt; phrases follow it."""
        self._check_template(given)
        self._look(given)
        # it comes after the prompt, with no options to tell
        negative = self._heard and given.get("prompt_embeds") is not None
        if not negative and encoding.missing(self.pipe) is None:
            self.options = encoding.options_of(self.pipe, given)
            self.options |= self.length_of(given.get("prompt_embeds"))
            self._encode(anew=not self._heard and given.get("prompt_embeds") is None)
        self.guides = bool(given.get("do_classifier_free_guidance", self.guides))
        said, earlier = other_prompt(self, given), self.rows if self._heard else None
        self.rows = earlier if said else encoding.rows_of(given)
        self._heard.append(said)

    def _encode(self, anew: bool) -> None:
        """Have the phrases' embeddings now, while the text encoders, which may change, are here."""
        before, self._embeddings = self._embeddings, {} if anew else self._embeddings
        for phrase in self._phrases() if self.encode else ():
            self.embeddings(phrase)
        for key, old in before.items() if anew else ():
            if key in self._embeddings and not torch.equal(old, self._embeddings[key]):
                self._images.clear()

    def _check_template(self, given: dict[str, Any]) -> None:
        """Refuse what stands before the prompt in the place of the pipeline's own."""
        for name, own in encoding.surroundings(self.pipe).items():
            told = given.get(name)
            if told != own and (told is not None or name == encoding.INSTRUCTION):
                _checks.refuse(name, "be the pipeline's own while a layout is on", repr(told))

    def _look(self, given: dict[str, Any]) -> None:
        """Take the images of a call; others make other tokens of a text."""
        if encoding.takes(self.pipe, "image"):
            image = given.get("image")
            if self._waits or not _same(image, self.pictures["image"]):
                self._embeddings.clear()
                self._images.clear()
            self.pictures, self._waits = {"image": image}, False

    def check(self) -> None:
        """Say once if the prompt of the call at hand is another than the layout's."""
        # one of several is the prompt, others are negative
        if self._heard and all(self._heard) and not self._said and not self._unheard():
            self._said = True
            warnings.warn(self._heard[0], stacklevel=2)
        self._heard.clear()

    def _unheard(self) -> bool:
        """Whether a text is heard of a call that guides beside a prompt's embeddings.

        Kandinsky 5 does not give them to encode_prompt.
        """
        guides = getattr(self.pipe, "guidance_scale", 1) > 1
        return len(self._heard) == 1 and guides and not encoding.takes(self.pipe, "prompt_embeds")

    def places(self, b: int, num_tokens: int | None = None) -> list[list[Place | None]]:
        """The places of each region's phrase, in each segment of one prompt."""
        return [
            []
            if chars is None
            else self._of(self.prompts[b], chars, num_tokens, self.argument(b, r), self.prompts)
            for r, chars in enumerate(self.chars[b])
        ]

    def embeddings(self, text: str, **more: Any) -> Tensor:
        """The embeddings [L, C] of a text, under the options of the last call and more."""
        options = self.options | {name: value for name, value in more.items() if value is not None}
        key = text, *sorted(options.items())
        if key not in self._embeddings:
            found = encoding.encode(self.pipe, text, **options, **self.pictures)
            self._embeddings[key] = found[0][0]
        return self._embeddings[key]

    def length_of(self, embeddings: Any) -> dict[str, Any]:
        """The option of a text as long as a caller's own embeddings [B, L, C]."""
        name = "max_sequence_length"
        tensor = isinstance(embeddings, Tensor) and embeddings.dim() == 3
        told = bool(self.segments) and self.segments[-1].longest is None
        if not (tensor and told and encoding.takes(self.pipe, name)):
            return {}
        length = self.segments[-1].tokens(embeddings.shape[1])
        default = inspect.signature(self.pipe.encode_prompt).parameters[name].default
        return {} if length < 1 or length == default else {name: length}

    def argument(self, b: int, r: int) -> str:
        """The name of a region in messages."""
        return f"regions[{r}]" if self.shared else f"regions[{b}][{r}]"

    def _characters(self, b: int) -> list[Span | None]:
        prompt, found = self.prompts[b], []
        for r, phrase in enumerate(self.regions[b].phrases):
            if phrase is not None and not self.segments:
                _checks.refuse("pipe", "have the tokenizer of its prompt", "none")
            named = phrase and phrases.characters(
                self.segments, prompt, phrase, self.argument(b, r)
            )
            found.append(named)
        return found

    def _of(
        self,
        prompt: str,
        chars: Span,
        num_tokens: int | None,
        argument: str,
        batch: list[str],
    ) -> list[Place | None]:
        found = [
            phrases.place_of(self.pipe, segment, prompt, chars, num_tokens, argument, batch)
            for segment in self.segments
        ]
        if not any(found):
            rule = f"have a phrase that its tokenizer keeps of the prompt {prompt!r}"
            _checks.refuse(argument, rule, repr(prompt[slice(*chars)]))
        return found

    def _image(self, b: int, num_tokens: int | None) -> Image:
        spans, embedded = [], []
        for r, places in enumerate(self.places(b, num_tokens)):
            there = [place for place in places if place]
            spans.append([(place.start, place.stop) for place in there])
            if self.encode and there and not self._waits:
                phrase = self._phrase(b, r)
                alone = self.embeddings(phrase)
                whole = (0, len(phrase)), len(alone)
                own = self._of(phrase, *whole, self.argument(b, r), [phrase])
                embedded += [
                    ((place.start, place.stop), alone[phrases.matched(place, one)])
                    for place, one in zip(places, own)
                    if place and one
                ]
        return Image(self.regions[b].masks, spans, embedded)

    def _phrase(self, b: int, r: int) -> str:
        return self.prompts[b][slice(*self.chars[b][r])]

    def _phrases(self) -> Iterator[str]:
        for b, regions in enumerate(self.chars):
            yield from (self._phrase(b, r) for r, chars in enumerate(regions) if chars is not None)

    def _needed(self) -> int:
        """The text tokens that hold all phrases."""
        images = range(len(self.prompts))
        return max(
            (
                place.needed
                for b in images
                for places in self.places(b)
                for place in places
                if place
            ),
            default=0,
        )

    def _warn_of_lost(self) -> None:
        """Where phrases overlap the later region counts, which may leave an earlier one nothing."""
        lost: dict[str, str] = {}
        for b in range(len(self.prompts)):
            tokens = [
                {token for place in places if place for token in range(*place[:2])}
                for places in self.places(b)
            ]
            for r, own in enumerate(tokens):
                if own and not own - set().union(*tokens[r + 1 :]):
                    lost[self.argument(b, r)] = self._phrase(b, r)
        for argument, phrase in lost.items():
            warnings.warn(
                f"{argument} has no token of its own: later regions take all of {phrase!r}",
                stacklevel=6,
            )


def _same(image: Any, other: Any) -> bool:
    """Whether two calls have one image, or lists of the same ones."""
    lists = [each if isinstance(each, list) else [each] for each in (image, other)]
    return len(lists[0]) == len(lists[1]) and all(map(operator.is_, *lists))
