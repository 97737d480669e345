"""Whether what a pipeline's encode_prompt is called with is the prompt that a layout has read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from . import encoding
from .tokens import tokens_of

if TYPE_CHECKING:
    from .reading import Reading
    from .segments import Segment

# of a token's distance from the empty prompt's: far above rounding, far below another word
NEAR = 0.1


def other_prompt(reading: Reading, given: dict[str, Any]) -> str | None:
    """The words for a call whose prompt is not the layout's, None where it is or cannot be told."""
    embeddings = given.get("prompt_embeds")
    if embeddings is not None:
        return _other_embeddings(reading, embeddings)
    for segment in reading.segments:
        texts = [given.get(name) or given.get("prompt") for name in segment.prompts]
        others = [_other_text(reading, segment, i, text) for i, text in enumerate(texts)]
        if all(others):
            return others[0]
    return None


def _other_text(reading: Reading, segment: Segment, i: int, given: Any) -> str | None:
    """The words for a text that is another prompt to a segment's tokenizer."""
    texts = [given] if isinstance(given, str) else given or []
    for b, text in _pairs(len(reading.prompts), texts):
        ours = reading.prompts[b]
        if isinstance(text, str) and text != ours:
            read = [
                tokens_of(segment.tokenizers[i], one, segment.tokens(None)).ids
                for one in (text, ours)
            ]
            if read[0] != read[1]:
                theirs = f"the call's prompt {text!r}"
                return f"{theirs} is not the layout's {ours!r}, by which phrases are placed"
    return None


def _other_embeddings(reading: Reading, given: Tensor) -> str | None:
    """The words for embeddings that hold another phrase where the layout's prompt has its own."""
    known = reading.segments and encoding.missing(reading.pipe) is None
    if encoding.takes(reading.pipe, "text_encoder_index"):
        return None  # of one encoder of two
    if not known or given.dim() != 3 or given.shape[1] < reading.needed:
        return None
    options = reading.length_of(given)
    for b, embeddings in _pairs(len(reading.prompts), given):
        try:
            right = _holds_phrases(reading, b, embeddings, **options)
        except RuntimeError:
            return None  # the text encoders are not where the pipeline runs: nothing to compare
        if not right:
            ours = f"what the layout's {reading.prompts[b]!r} encodes to"
            return f"the call's prompt_embeds are not {ours}, by which phrases are placed"
    return None


def _holds_phrases(reading: Reading, b: int, given: Tensor, **options: Any) -> bool:
    """Whether each phrase's tokens are the prompt's own, or the prompt's own in another weight."""
    right, empty = (reading.embeddings(text, **options) for text in (reading.prompts[b], ""))
    if right.shape[1] != given.shape[1]:
        return True  # of another kind: nothing to compare
    for r, places in enumerate(reading.places(b, len(right))):
        there = reading.places(b, len(given))[r]
        both = [pair for pair in zip(places, there) if all(pair)]
        if both and not any(
            _weighted(
                given[theirs.start : theirs.stop],
                *(side[ours.start : ours.stop] for side in (right, empty)),
            )
            for ours, theirs in both
        ):
            return False
    return True


def _weighted(given: Tensor, right: Tensor, empty: Tensor) -> bool:
    """Whether tokens [n, C] are multiples of the right ones, from 0 or from the empty prompt's."""
    given, right, empty = (side.to(right.device).float() for side in (given, right, empty))
    far = NEAR * (given - empty).norm(dim=1)
    near = []
    for base in (0, empty):
        ours, theirs = right - base, given - base
        weight = (ours * theirs).sum(1) / (ours * ours).sum(1)
        near.append(((theirs - weight[:, None] * ours).norm(dim=1) <= far) & (weight > 0))
    return bool((near[0] | near[1]).all())


def _pairs(images: int, given: Sequence[Any] | Tensor) -> Iterator[tuple[int, Any]]:
    """The image beside whose prompt each entry of a call stands; none where numbers do not fit."""
    longer, shorter = max(images, len(given)), min(images, len(given))
    if shorter and longer % shorter == 0:
        for row in range(longer):
            yield row * images // longer, given[row * len(given) // longer]
