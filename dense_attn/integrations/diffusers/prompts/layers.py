"""All kinds and sizes of a model's layers, for one grid of latents and the texts of a call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..models.record import IMAGE, TEXT, Attention
from .blocks import Blocks, Half, Part, Rule, Sequence
from .sharing import words_of

if TYPE_CHECKING:
    from ..models.record import Call, Model
    from .image import ImageTokens
    from .options import Options
    from .reading import RegionReading
    from .texts import Slots, Span

# layers of a model whose record has no table
OF_UNETS = Attention("self", (IMAGE,)), Attention("cross", (IMAGE,), (TEXT,))
TEXT_ALONE = "text alone"  # the kind of layers in which text tokens see each other


def attentions_of(model: Model, call: Call | None = None) -> tuple[Attention, ...]:
    """The kinds of a model's layers, or those of one of its calls."""
    return (model.attentions if call is None else model.attentions_of(call)) or OF_UNETS


def has_text(segments: tuple | None) -> bool:
    """Whether tokens of a text are among segments."""
    return any(segment.kind == "text" for segment in segments or ())


def multiple_of(model: Model) -> int:
    """The number of which padding makes a text's tokens a multiple."""
    sides = [side or () for _, *both in attentions_of(model) for side in both]
    return max(one.multiple for side in sides for one in side if one.kind == "text")


@dataclass(eq=False)
class Layers:
    """The layers of one call, and all that they are made from."""

    model: Model
    reading: RegionReading
    options: Options
    call: Call
    slots: Slots
    spans: tuple[Span, ...]
    image: ImageTokens

    def parts(self) -> dict[tuple[str, int], Part]:
        """The layers by kind and halvings of the grid."""
        found: dict[tuple[str, int], Part] = {}
        for depth, size in enumerate(self.image.sizes):
            for attention in attentions_of(self.model, self.call):
                part = self._part(attention, size)
                if part is not None:
                    found[attention.layers, depth] = part
        if self.model.text_layers is not None:
            found[TEXT_ALONE, 0] = self._of_text()
        return found

    def _part(self, attention: Attention, size: tuple[int, int]) -> Part | None:
        """The layers of one kind and size; None for those that are left alone."""
        _, queries, keys = attention
        text = has_text(queries) or has_text(keys)
        isolate, backend = self.options.isolate, self.options.backend
        if not text and (not isolate or not any(span.positive for span in self.spans)):
            return None
        sequence = self._sequence(attention, size)
        sizes = (sequence.count(side) for side in (queries, queries if keys is None else keys))
        rule = Rule("mask" if text or isolate == 1 else "bias", backend)
        part = Part(*sizes, keys is None, rule, text)
        for span in self.spans:
            half = self._half(span, size)
            made = self._with_texts if text else self._isolated
            for on in (True, False):
                part.blocks[on, span.positive] = made(sequence, half, on, span.positive)
        return part

    def _sequence(self, attention: Attention, size: tuple[int, int]) -> Sequence:
        """The tokens of a kind of layers."""
        image = self.image.frames * size[0] * size[1]
        others = self.model.references(self.call, image) if self.call.latents.dim() == 3 else 0
        return Sequence(attention, self.slots.total, image, others)

    def _with_texts(self, sequence: Sequence, half: Half, on: bool, positive: bool) -> Blocks:
        """The calls of layers that see texts; cross-attention to the first alone has none."""
        joint = has_text(sequence.attention.queries)
        if not joint and not (on and (positive or self.reading.negatives)):
            return Blocks([])
        shares = half.shares if on else half.first_alone()
        isolate = bool(self.options.isolate)
        apart = joint and on and positive and isolate and self.options.base_ratio > 0
        blocks = sequence.blocks(half, shares, isolate, apart)
        if on and self.options.area_scaling:
            blocks = blocks._replace(scales=half.spread(self._scales(half))[:, None, :, None])
        return blocks

    def _scales(self, half: Half) -> Tensor:
        """The factor of each text token's scores, float32 [P, N]: the image's area over its own."""
        sizes = torch.tensor(self.slots.sizes, dtype=torch.int64, device="cpu")
        factors = torch.ones(len(half.own), len(sizes), dtype=torch.float32, device="cpu")
        for row, area in zip(factors, half.areas):
            row[1 : 1 + len(area)] = 1 / area
        return factors.repeat_interleave(sizes, 1)

    def _isolated(self, sequence: Sequence, half: Half, on: bool, positive: bool) -> Blocks:
        """Self-attention in which tokens of another region count less."""
        if not on or not positive:
            return Blocks([])
        image = torch.stack([words_of(one) for one in half.own])
        every = torch.full_like(image[:, :1], -1)
        words = sequence.joined(sequence.attention.queries, half.text, image, every)
        apart = torch.tensor(1 - self.options.isolate, dtype=torch.float64, device="cpu")
        strength = 0.0 if self.options.isolate == 1 else -float(apart.log())
        return Blocks([(half.layer(words, None, strength), None)])

    def _of_text(self) -> Part:
        """Layers of the text alone, in which each text sees itself."""
        count = self.slots.count
        part = Part(count, count, True, Rule("mask", self.options.backend))
        for span in self.spans:
            half = self._half(span, (1, 1))
            blocks = Blocks([(half.layer(half.text, None), None)])
            part.blocks[True, span.positive] = part.blocks[False, span.positive] = blocks
        return part

    def _half(self, span: Span, size: tuple[int, int]) -> Half:
        """Some rows' shares of image tokens, and words of text tokens."""
        slots, own = self.slots, self.image.own(size)
        each = (span.stop - span.start) // len(own)
        # a text that all rows share has one row
        rows = [min(span.start + b * each, len(slots.lengths) - 1) for b in range(len(own))]
        text = slots.words(rows)
        shares, areas = self.image.shares(own, span.positive), self.image.areas(size)
        return Half(shares, own, areas, text, each, self.call.text.device)
