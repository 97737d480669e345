"""The state of a block of region prompts: the texts of a call, and who sees which of them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention.masks import Mask

from .._attention_hook import Expected, is_marked
from ..hooks import arguments, unwrapped, watchers
from ..state import LayerMark, LayoutState
from . import texts
from .blocks import Part, rows_of
from .image import ImageTokens
from .layers import TEXT_ALONE, Layers, multiple_of
from .options import Options
from .reading import RegionReading, Text
from .texts import Slots, Span, Texts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Call, Model


class RegionMark(LayerMark):
    """A block's knowledge of one attention module, and its place among those of its kind."""

    state: RegionState

    def __init__(self, state: RegionState, name: str, kind: str, depth: int, index: int) -> None:
        super().__init__(state, name, kind, depth)
        self.on = index % state.options.every == 0
        self.gathers = 0  # the further rows of text of which the layer makes keys now
        self.gathered: tuple[Tensor, Tensor] | None = None  # keys and values [R * B, H, L, D]

    def expected(self) -> Expected | None:
        """The softmax to exchange in this call; None in steps and layers that are left alone."""
        if self.gathers:
            return Expected(0, self.gathers, 1, self.state.slots.own)
        return self.state.expected_of(self)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Mask | None = None
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D] as [B, H, M, D]."""
        if self.gathers:
            self.gathered = k, v
            return torch.zeros_like(q)
        if self.gathered is not None:
            both, self.gathered = zip((k, v), self.gathered), None
            k, v = (torch.cat([own, *more.split(len(own))], 2) for own, more in both)
        return self.state.attention(self, q, k, v, scale, mask)


class RegionState(LayoutState):
    """One `apply_layout` block whose regions have prompts."""

    reading: RegionReading
    options: Options

    def __init__(
        self, pipe: DiffusionPipeline, model: Model, reading: RegionReading, options: Options
    ) -> None:
        super().__init__(pipe, model, reading, options)
        self.parts: dict[tuple[str, int], Part] = {}  # by kind and halvings of the grid
        # by all that they depend on, and beside what keeps their call's key its own
        self._made: dict[tuple, tuple[Layers, dict[tuple[str, int], Part]]] = {}
        self.spans: tuple[Span, ...] = ()  # of this call; none where nothing is changed
        self.batch = 0
        self.slots: Slots | None = None
        self._told_apart: set[bool] = set()  # whether calls were the prompt's
        self._most = max(len(image.prompts) for image in reading.images_of)
        self._image: tuple[object, ImageTokens | None] = None, None  # of the last call, by its grid

    @property
    def masks(self) -> list[Tensor]:
        """The masks of each image's regions, [R, H, W] or [R, F, H, W]."""
        return [image.masks for image in self.reading.images_of]

    def marks(self, layers: dict[str, tuple[Any, str, int]]) -> list[tuple[Any, LayerMark]]:
        """The marks of attention modules by name with their kind and depth, and of the text's."""
        layers = layers | self._text_layers()
        self.attentions = {name: layer for name, (layer, *_) in layers.items()}
        found, counts = [], Counter()  # each of two denoisers has a first layer of a kind
        for name, (layer, kind, depth) in layers.items():
            of = self.model.root(self.pipe, name)[0], kind
            found.append((layer, RegionMark(self, name, kind, depth, counts[of])))
            counts[of] += 1
        return found

    def _text_layers(self) -> dict[str, tuple[Any, str, int]]:
        if self.model.text_layers is None:
            return {}
        return {
            f"{start}{name}": (module, TEXT_ALONE, 0)
            for start, denoiser in self.model.denoisers(self.pipe).items()
            for name, module in unwrapped(denoiser).named_modules()
            if hasattr(module, "processor") and re.search(self.model.text_layers, name)
        }

    def missed(self, mark: LayerMark, seen: list[tuple[int, int]]) -> None:
        """Refuse another number of tokens: the layer would see the texts of all regions.

        Layers of the text alone may be a ControlNet's too, whose text is the call's.
        """
        if mark.kind == TEXT_ALONE:
            return
        expected = self.parts[mark.kind, mark.depth].num_queries
        rule = f"give {mark.name} the {expected} tokens of its latents' grid"
        _checks.refuse("pipe", rule, seen[0][0] if seen else "none")

    def expected_of(self, mark: RegionMark) -> Expected | None:
        """The softmax of a layer; of one that is left out too, where it sees the first text."""
        part = self.parts.get((mark.kind, mark.depth))
        if not self.spans or part is None:
            return None
        num_keys = self.slots.own if mark.kind == self.model.beside else part.num_keys
        sizes = part.num_queries, num_keys, part.same_tokens, self.sources
        if part.text:
            return Expected(0, self.batch, *sizes)
        prompt = [(span.start, span.stop) for span in self.spans if span.positive]
        return Expected(*prompt[0], *sizes) if prompt and mark.on else None

    def attention(
        self,
        mark: RegionMark,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        mask: Mask | None,
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D] as [B, H, M, D]."""
        part = self.parts[mark.kind, mark.depth]
        mask = None if self.model.words_alone else mask
        spans = self.spans if part.text else (Span(0, len(q), True),)
        parts = []
        for start, stop, positive in spans:
            there = None if mask is None else rows_of(mask, start, stop)
            blocks = part.blocks[mark.on, positive]
            given = (side[start:stop] for side in (q, k, v))
            parts.append(blocks.attention(*given, scale, there, self.slots.own, part.rule))
        if len(parts) == 1:
            return parts[0]
        # heads beside each other in memory, which is how processors read them next
        return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)

    def before_call(
        self, denoiser: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """A hook before each call of the denoiser: the texts of the regions behind the call's."""
        self.spans = ()
        if self.paused or (self.options.base_ratio == 1 and not self.options.isolate):
            return None
        self._check(denoiser)
        bound = arguments(denoiser, args, kwargs)
        call = self.model.read(bound.arguments)
        self.steps.follow(call.timestep, self.model.unit)
        self.reading.check()
        said = self.reading.rows, self.reading.guides
        rows = self._rows.of(call.latents, call.text, self.steps.repeated, *said)
        spans = self._spans(rows, len(call.latents))
        self._told_apart.update(span.positive for span in spans)
        # a call of its own, of the negative prompt or of what a guider asks for beside it
        alone = rows is None and (self._rows.beside or not self.reading.negatives)
        if alone or not self.steps.within(*self.options.window):
            return None
        self.model.check(bound.arguments)
        self._follow(call)
        if not self._sees_call(spans) and self.model.without_text(bound.arguments):
            call = self.model.read(bound.arguments)
        made = self._texts(bound.arguments, call, spans)
        self._make(call, made.slots, spans)
        self.model.lengthen(bound.arguments, made)
        self.sources = self.model.mask_sources(bound.arguments)
        self.spans, self.batch, self.slots = spans, len(call.latents), made.slots
        self._tell_of_cache(unwrapped(denoiser))
        return bound.args[1:], bound.kwargs

    def tell_of_negatives(self) -> None:
        """Warn at a block's end of negative prompts that no call had a place for."""
        if self.reading.negatives and self._told_apart == {True}:
            text = "regions have a negative prompt, and the pipeline was called without guidance"
            warnings.warn(text, stacklevel=4)  # the end of the user's with

    def _check(self, denoiser: torch.nn.Module) -> None:
        for name, layer in self.attentions.items():
            if not is_marked(layer.processor):
                rule = "keep the layout's attention processors inside of the block"
                _checks.refuse("pipe", rule, f"{type(layer.processor).__name__} in {name}")
        if any(not isinstance(block, LayoutState) for block in watchers(denoiser)):
            rule = "be without semantic guidance while regions have prompts"
            _checks.refuse("pipe", rule, "both")

    def _spans(self, rows: tuple[int, int] | None, batch: int) -> tuple[Span, ...]:
        """The rows of a call, which may all be the negative prompt's."""
        if rows is None:
            return (Span(0, batch, False),)
        first, last = rows
        spans = Span(0, first, False), Span(first, last, True), Span(last, batch, False)
        return tuple(span for span in spans if span.start < span.stop)

    def _texts(self, given: dict[str, Any], call: Call, spans: tuple[Span, ...]) -> Texts:
        """The texts of a call in their slots."""
        images, (text, own) = self.reading.images_of, self.model.own_text(given, call.text)
        if len(text) < len(call.latents) and len(images) > 2:  # one for all rows
            text, own = text.expand(len(call.latents), -1, -1), own * len(call.latents)
        keep = self.model.keeps_padding or given.get(self.model.text_mask) is None
        rows, sees_first = [], []
        for row in range(len(text)):
            span = next(span for span in spans if row < span.stop)
            b = (row - span.start) * len(images) // (span.stop - span.start)
            rows.append(self.reading.texts(span.positive)[b])
            sees_first.append(self._image[1].sees_first[span.positive][b])
        slots = self._slots(own, rows, sees_first, keep)
        made = texts.written(text, slots, rows, keep)
        second = self.model.second_text(given)
        if second is None:
            return made
        text, own = second
        rows = [[None if one is None else one.second for one in row] for row in rows]
        other = texts.written(text, self._slots(own, rows, sees_first, False), rows, False)
        return replace(made, slots=replace(slots, second=other.slots), second=other)

    def _slots(
        self, own: list[int], rows: list[list[Text | None]], sees_first: list[bool], keep: bool
    ) -> Slots:
        """The slots of rows' own texts, of so many tokens each, and of those of their regions."""
        multiple, lengths, longest = multiple_of(self.model), [], []
        for length, there, sees in zip(own, rows, sees_first):
            counts = [0 if one is None else len(one.tokens if keep else one.bare) for one in there]
            lengths.append((length, *counts) + (0,) * (self._most - len(counts)))
            longest.append(texts.up(max([length if sees else 0, *counts]), multiple))
        sizes = tuple(texts.up(max(column), multiple) for column in zip(*lengths))
        return Slots(sizes, tuple(lengths), multiple, tuple(longest))

    def _follow(self, call: Call) -> None:
        """Take the grid of a call's latents, on which its layers share the image's tokens."""
        found = call.key, self.asked
        if found != self._image[0]:
            given = self.model, self.reading, self.options, call, self.asked
            self._image = found, ImageTokens(*given)

    def _sees_call(self, spans: tuple[Span, ...]) -> bool:
        """Whether any token of these rows sees the call's own text, in any layer."""
        first = self._image[1].sees_first
        return self.options.every > 1 or any(any(first[span.positive]) for span in spans)

    def _make(self, call: Call, slots: Slots, spans: tuple[Span, ...]) -> None:
        """The layers of a latent grid and texts of some lengths, once a run for each prompt."""
        made_for = call.key, slots, call.text.device, spans, self.asked
        made_for += (torch.is_inference_mode_enabled(),)  # whose tensors no gradient may keep
        found = self._made.pop(made_for, None)
        if found is None:
            made = call, slots, spans, self._image[1]
            layers = Layers(self.model, self.reading, self.options, *made)
            found = layers, layers.parts()
        (_, self.parts), self._made[made_for] = found, found
        while len(self._made) > 2:  # the latest: the prompt's and the negative one's
            del self._made[next(iter(self._made))]
