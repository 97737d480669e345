"""The state of a block of region prompts: the texts of a call, and who sees which of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention.layout import _BITS

from .. import regions as phrase_regions
from .._attention_hook import Expected, is_marked
from ..hooks import arguments, unwrapped, watchers
from ..state import Layer, LayerMark, LayoutState, Side, order_of
from ..text.reading import Reading
from .options import Options
from .sharing import Round, members, rounds, words_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Call, Model
    from .region import Regions


class Rule(NamedTuple):
    """How a layer's words count."""

    modulation: str
    backend: str


class RegionReading(Reading):
    """The prompts of the regions, encoded as the pipeline encodes its own."""

    def __init__(
        self, pipe: DiffusionPipeline, prompts: list[str] | None, regions: list[Regions]
    ) -> None:
        given = [""] * len(regions) if prompts is None else prompts
        self.texts = [text for image in regions for text in image.texts]
        self.images_of = regions * len(given) if len(regions) == 1 else regions
        none = phrase_regions.Regions([], torch.zeros(0, 1, 1, dtype=torch.bool, device="cpu"))
        super().__init__(pipe, given, [none], encode=True)
        self.base = prompts is not None
        if not self.base:
            self.segments = []  # a call may have any prompt

    def blocks(self, positive: bool) -> list[list[Tensor | None]]:
        """The embeddings [L, C] of each image's regions; None for the negative prompt's own."""
        return [
            [
                None if text is None else self.embeddings(text)
                for text in (image.prompts if positive else image.negatives)
            ]
            for image in self.images_of
        ]

    def _phrases(self) -> Iterator[str]:
        yield from self.texts


class Blocks(NamedTuple):
    """A cross-attention layer's calls for one half of the batch; none: the first text alone."""

    calls: list[tuple[Layer, Tensor | None]]  # shares float32 [B|1, 1, M, 1]

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, num_tokens: int, rule: Rule
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D] as [B, H, M, D]; num_tokens: of the first text."""
        if not self.calls:
            k, v = k[:, :, :num_tokens], v[:, :, :num_tokens]
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        out = None
        for layer, shares in self.calls:
            part = layer.attention(q, k, v, scale=scale, options=rule)
            part = part if shares is None else part * shares.to(part.dtype)
            out = part if out is None else out + part
        return out


class RegionMark(LayerMark):
    """A block's knowledge of one attention module, and its place among those of its kind."""

    state: RegionState

    def __init__(self, state: RegionState, name: str, kind: str, depth: int, index: int) -> None:
        super().__init__(state, name, kind, depth)
        self.on = index % state.options.every == 0

    def expected(self) -> Expected | None:
        """The softmax to exchange in this call; None in steps and layers that are left alone."""
        state = self.state
        if state.first == state.last:
            return None
        if self.kind == "cross":  # also where its block is left out: it sees the first text alone
            layer = state.sizes[self.depth]
            return Expected(0, state.batch, layer, state.num_keys)
        if not self.on or not state.options.isolate:
            return None
        return state.expected(self.kind, self.depth)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: object = None
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D], of which all keys are there."""
        if mask is not None:
            _checks.refuse("attention_mask", "be None while regions have prompts", "a mask")
        state = self.state
        if self.kind == "cross":
            return state.cross(self.depth, self.on, q, k, v, scale)
        layer = state.layers[self.kind, self.depth]
        return layer.attention(q, k, v, scale=scale, options=state.isolation)


class RegionState(LayoutState):
    """One `apply_layout` block whose regions have prompts."""

    reading: RegionReading
    options: Options

    def __init__(
        self, pipe: DiffusionPipeline, model: Model, reading: RegionReading, options: Options
    ) -> None:
        super().__init__(pipe, model, reading, options)
        self.sizes: dict[int, int] = {}  # queries, by halvings of the grid
        self.halves: dict[tuple[bool, int], Blocks] = {}  # of the prompt or the negative one
        self.batch, self.num_keys, self.num_tokens = 0, 0, 0  # of this call
        self.masked = Rule("mask", options.backend)
        self.isolation = Rule("mask" if options.isolate == 1 else "bias", options.backend)

    def marks(self, layers: dict[str, tuple[Any, str, int]]) -> list[tuple[Any, LayerMark]]:
        """The marks of attention modules, given by name with their kind and depth."""
        self.attentions = {name: layer for name, (layer, *_) in layers.items()}
        found: list[tuple[Any, LayerMark]] = []
        counts = {"self": 0, "cross": 0}
        for name, (layer, kind, depth) in layers.items():
            found.append((layer, RegionMark(self, name, kind, depth, counts[kind])))
            counts[kind] += 1
        return found

    def missed(self, mark: LayerMark, seen: list[tuple[int, int]]) -> None:
        """Refuse another number of tokens: the layer would see the texts of all regions."""
        rule = f"give {mark.name} the {self.sizes[mark.depth]} tokens of its latents' grid"
        _checks.refuse("pipe", rule, seen[0][0] if seen else "none")

    def cross(
        self, depth: int, on: bool, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        """Cross-attention of the whole batch, q, k, v [B, H, N, D]."""
        parts = []
        for start, stop, positive in ((0, self.first, False), (self.first, self.last, True)):
            if start < stop:
                blocks = self.halves[positive, depth] if on else Blocks([])
                rows = (side[start:stop] for side in (q, k, v))
                parts.append(blocks.attention(*rows, scale, self.num_tokens, self.masked))
        if len(parts) == 1:
            return parts[0]
        # heads beside each other in memory, which is how processors read them next
        return torch.cat([part.transpose(1, 2) for part in parts]).transpose(1, 2)

    def before_call(
        self, denoiser: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """A hook before each call of the denoiser: the texts of the regions behind the call's."""
        self.first = self.last = 0
        if self.paused or self.options.base_ratio == 1:
            return None
        self._check(denoiser)
        bound = arguments(denoiser, args, kwargs)
        call = self.model.read(bound.arguments)
        self.steps.follow(call.timestep, self.model.unit)
        self.reading.check()
        said = self.reading.rows, self.reading.guides
        rows = self._rows.of(call.latents, call.text, self.steps.repeated, *said)
        start, stop = (part * self.steps.total for part in self.options.window)
        if rows is None or not start <= self.steps.index < stop:
            return None
        if bound.arguments.get("encoder_attention_mask") is not None:
            _checks.refuse("encoder_attention_mask", "be None while regions have prompts", "a mask")
        self._make(call, *rows)
        self._with_texts(bound.arguments, call, *rows)
        self.first, self.last = rows
        self._tell_of_cache(unwrapped(denoiser))
        return bound.args[1:], bound.kwargs

    def _check(self, denoiser: torch.nn.Module) -> None:
        for name, layer in self.attentions.items():
            if not is_marked(layer.processor):
                rule = "keep the layout's attention processors inside of the block"
                _checks.refuse("pipe", rule, f"{type(layer.processor).__name__} in {name}")
        if any(not isinstance(block, LayoutState) for block in watchers(denoiser)):
            rule = "be without semantic guidance while regions have prompts"
            _checks.refuse("pipe", rule, "both")

    def _with_texts(self, given: dict[str, Any], call: Call, first: int, last: int) -> None:
        """The texts of the regions in a call's arguments."""
        given["encoder_hidden_states"] = self._texts(call.text, first, last)

    def _texts(self, text: Tensor, first: int, last: int) -> Tensor:
        """The text tokens [B, L, C], with those of the regions behind them in each row."""
        each = (last - first) // len(self.images)
        more = text.new_zeros(len(text), self.num_keys - text.shape[1], text.shape[2])
        for positive, begin in ((True, first), (False, 0)):
            if not positive and not first:
                continue
            for b, blocks in enumerate(self.reading.blocks(positive)):
                there = [block for block in blocks if block is not None]
                if there:
                    joined = torch.cat(there).to(text)
                    more[begin + b * each : begin + (b + 1) * each, : len(joined)] = joined
        return torch.cat([text, more], 1)

    def _make(self, call: Call, first: int, last: int) -> None:
        """The layers of a latent grid and a number of text tokens, once a run."""
        self.batch, self.num_tokens = last, call.text.shape[1]
        texts = {positive: self.reading.blocks(positive) for positive in (True, False)}
        lengths = [[0 if x is None else len(x) for x in row] for row in texts[True] + texts[False]]
        self.num_keys = self.num_tokens + max(sum(row) for row in lengths)
        made_for = call.key, self.num_tokens, str(lengths), call.text.device, first, last
        if made_for == self._made_for:
            return
        self.layers, self.halves = {}, {}
        self._make_layers_of(call, texts, (last - first) // len(self.images))
        self._made_for, self._call = made_for, call

    def _make_layers_of(
        self, call: Call, texts: dict[bool, list[list[Tensor | None]]], each: int
    ) -> None:
        """Each halving of the latents has layers of both kinds."""
        height, width = self.model.grid(call)
        for depth in range(self.model.deepest + 1):
            self._make_depth(depth, (height, width), texts, each, call.text.device)
            height, width = (height + 1) // 2, (width + 1) // 2

    def _make_depth(
        self,
        depth: int,
        size: tuple[int, int],
        texts: dict[bool, list[list[Tensor | None]]],
        each: int,
        device: torch.device,
    ) -> None:
        """The layers of one size."""
        shares = [
            members(image.masks, image.weights, size, self.reading.base)
            for image in self.reading.images_of
        ]
        self.sizes[depth] = size[0] * size[1]

        def spread(side: Tensor) -> Tensor:
            side = side if len(self.images) == 1 else side.repeat_interleave(each, 0)
            return side.to(device)

        def layer(words: Tensor, k_words: Tensor | None, strength: float = 0.0) -> Layer:
            order = spread(order_of(Side(words, words)))
            words = spread(words)
            now = torch.full((1, 1, 1), strength, dtype=torch.float32, device=device)
            keys, k_order = (words, order) if k_words is None else (spread(k_words), None)
            return Layer(words, keys, now, order, k_order, now)

        if self.options.isolate:
            apart = torch.tensor(1 - self.options.isolate, dtype=torch.float64, device="cpu")
            strength = 0.0 if self.options.isolate == 1 else -float(apart.log())
            words = torch.stack([words_of(image) for image in shares])
            self.layers["self", depth] = layer(words, None, strength)
        for positive, blocks in texts.items():
            found: list[Round] = []
            if positive or any(block is not None for image in blocks for block in image):
                found = rounds([self._of_blocks(*pair) for pair in zip(shares, blocks)])
            k_words = self._key_words(blocks)
            self.halves[positive, depth] = Blocks(
                [
                    (
                        layer(one.words, k_words),
                        None if one.shares is None else spread(one.shares)[:, None, :, None],
                    )
                    for one in found
                ]
            )

    def _of_blocks(self, shares: Tensor, blocks: list[Tensor | None]) -> Tensor:
        """Shares [1 + R, M] with the base prompt's part, which also has regions without a text."""
        ratio = self.options.base_ratio
        shares = torch.cat([ratio + (1 - ratio) * shares[:1], (1 - ratio) * shares[1:]])
        for r, block in enumerate(blocks):
            if block is None:
                shares[0] += shares[1 + r]
                shares[1 + r] = 0
        alone = shares.max(0).values > 1 - 1e-6  # of one block, but for rounding
        return torch.where(alone, (shares == shares.max(0).values).float(), shares)

    def _key_words(self, images: list[list[Tensor | None]]) -> Tensor:
        """The block of each text token, int32 [P, N]; 0 behind the last of an image."""
        words = torch.zeros(len(images), self.num_keys, dtype=torch.int32, device="cpu")
        for b, blocks in enumerate(images):
            words[b, : self.num_tokens] = _BITS[0]
            begin = self.num_tokens
            for r, block in enumerate(blocks):
                if block is not None:
                    words[b, begin : begin + len(block)] = _BITS[1 + r]
                    begin += len(block)
        return words
