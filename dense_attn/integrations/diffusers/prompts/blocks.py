"""The attention of layers while regions have prompts: words of all tokens, and calls of the op."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn.layout_attention.layout import _BITS
from dense_attn.layout_attention.masks import Mask

from ..layers import Layer, Side, order_of
from ..models.record import Attention, Segment
from .sharing import Round, rounds, words_of

IMAGE = _BITS[-1]  # a bit beside those of the texts, which tokens of the image have in common


class Rule(NamedTuple):
    """How a layer's words count."""

    modulation: str
    backend: str


class Blocks(NamedTuple):
    """A layer's calls for some rows of the batch; none: the first text alone."""

    calls: list[tuple[Layer, Tensor | None]]  # shares float32 [B|1, 1, M, 1]
    scales: Tensor | None = None  # of the scores of each key, float32 [B|1, 1, N, 1]

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        mask: Mask | None,
        num_tokens: int,
        rule: Rule,
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D] as [B, H, M, D]; num_tokens: of the first text."""
        if not self.calls:
            k, v = k[:, :, :num_tokens], v[:, :, :num_tokens]
            there = None if mask is None else mask.keys[:, None, None, :num_tokens]
            there = there.to(q.dtype) if there is not None and there.is_floating_point() else there
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=there, scale=scale
            )
        dtype = q.dtype
        if self.scales is not None:
            if dtype == torch.float16:  # whose range a factor leaves
                q, k, v, mask = q.float(), k.float(), v.float(), _wide(mask)
            k = k * self.scales.to(k.dtype)
        run = partial(self._sum, rule=rule)
        out = run(q, k, v, scale=scale) if mask is None else mask.attention(q, k, v, scale, run)
        return out.to(dtype)

    def _sum(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        rule: Rule,
        k_mask: Tensor | None = None,
    ) -> Tensor:
        """The calls' results by their shares."""
        out = None
        for layer, shares in self.calls:
            part = layer.attention(q, k, v, scale=scale, options=rule, k_mask=k_mask)
            part = part if shares is None else part * shares.to(part.dtype)
            out = part if out is None else out + part
        return out


@dataclass(eq=False)
class Part:
    """Layers of one kind and size."""

    num_queries: int
    num_keys: int
    same_tokens: bool
    rule: Rule
    text: bool = True  # whether they see text tokens, of which all rows of the batch have more
    # by whether the layer is on, and whether the rows are the prompt's
    blocks: dict[tuple[bool, bool], Blocks] = field(default_factory=dict)


class Half(NamedTuple):
    """Rows of the batch that see prompts, or negative prompts."""

    shares: list[Tensor]  # of each image, of the texts that there are, [1 + R, M]
    own: list[Tensor]  # of the regions alone, [1 + R, M]
    areas: list[Tensor]  # of each image's regions, [R]
    text: Tensor  # words of the text tokens, int32 [P, N]
    each: int  # rows of an image
    device: torch.device

    def spread(self, side: Tensor) -> Tensor:
        """A tensor of each image for their rows."""
        side = side if len(self.shares) == 1 else side.repeat_interleave(self.each, 0)
        return side.to(self.device)

    def layer(self, words: Tensor, keys: Tensor | None, strength: float = 0.0) -> Layer:
        """A layer of queries' words [P, M] and keys' [P, N]; None: the queries' own tokens."""
        order = self.spread(order_of(Side(words, words)))
        now = torch.full((1, 1, 1), strength, dtype=torch.float32, device=self.device)
        words = self.spread(words)
        k_words, k_order = (words, order) if keys is None else (self.spread(keys), None)
        return Layer(words, k_words, now, order, k_order, now)

    def first_alone(self) -> list[Tensor]:
        """Shares of layers that are left out: the call's prompt has all."""
        return [torch.cat([torch.ones_like(x[:1]), torch.zeros_like(x[1:])]) for x in self.shares]


class Sequence(NamedTuple):
    """A layer's tokens."""

    attention: Attention
    text: int  # tokens
    image: int  # of all frames of a video
    others: int  # that come as latents behind the image's

    def count(self, segments: tuple[Segment, ...]) -> int:
        """The tokens of segments."""
        sides = (
            torch.zeros(1, n, dtype=torch.int32, device="cpu") for n in (self.text, self.image, 1)
        )
        return self.joined(segments, *sides).shape[1]

    def joined(
        self, segments: tuple[Segment, ...], text: Tensor, image: Tensor, other: Tensor
    ) -> Tensor:
        """Values of segments' tokens [P, N]; other [P, 1]: those of no text and no place."""
        sides = []
        for segment in segments:
            if segment.kind == "text":
                side = text
            elif segment.kind == "image":
                side = image
            else:
                side = other.expand(-1, self.others if segment.count is None else segment.count)
            sides += [side, other.expand(-1, -side.shape[1] % segment.multiple)]
        return torch.cat(sides, 1)

    def blocks(
        self, half: Half, shares: list[Tensor], isolate: bool, apart: bool = False
    ) -> Blocks:
        """The calls with the texts, of image tokens with these shares.

        A text sees itself and the image in its region. The image sees its texts and, unless
        isolated, all of itself; tokens of no text and no place see all that the image sees, and
        are seen by all. Where the first text has a share of regions that stay apart, it has a call.
        """
        _, queries, keys = self.attention
        pairs = zip(half.shares, shares)
        seen = torch.stack([words_of(own) | words_of(these) for own, these in pairs])
        other = _united(seen) | IMAGE

        def met(words: Tensor) -> Tensor:
            return words if isolate else torch.where(words == 0, 0, words | IMAGE)

        k_words = self.joined(queries if keys is None else keys, half.text, met(seen), other)
        calls = []
        others = [torch.cat([0 * these[:1], these[1:]]) for these in shares]
        for j, one in enumerate(rounds(others if apart else shares)):
            some = 0 if j else 1  # other calls leave tokens other than the image's alone
            words = self.joined(queries, some * half.text, met(one.words), some * other)
            calls.append((self._layer(half, words, k_words), self._shares(half, one, some)))
        return Blocks([*calls, self._first(half, shares, other)] if apart else calls)

    def _layer(self, half: Half, words: Tensor, k_words: Tensor) -> Layer:
        """A layer whose keys have words of their own, though they may be the queries' tokens."""
        layer = half.layer(words, k_words)
        if self.attention.keys is None:
            layer.k_order = half.spread(order_of(Side(k_words, k_words)))
        return layer

    def _first(
        self, half: Half, shares: list[Tensor], other: Tensor
    ) -> tuple[Layer, Tensor | None]:
        """The call of image tokens that see the first text, by a bit of its own, and regions'."""
        _, queries, keys = self.attention
        part, own = (torch.stack(x) for x in ([s[0] for s in shares], [*map(words_of, half.own)]))
        words = torch.where(part > 0, own | IMAGE, 0)
        text = torch.where(half.text == _BITS[0], IMAGE, 0).to(own.dtype)
        k_words = self.joined(queries if keys is None else keys, text, own, other)
        one = Round(self.joined(queries, 0 * text, words, 0 * other), part)
        return self._layer(half, one.words, k_words), self._shares(half, one, 0)

    def _shares(self, half: Half, one: Round, rest: int) -> Tensor | None:
        """The shares of a call's queries, None where all are 1; rest: that of other tokens."""
        if one.shares is None:
            return None
        text = torch.full_like(half.text, rest, dtype=torch.float32)
        _, queries, _ = self.attention
        shares = self.joined(queries, text, one.shares, torch.full_like(text[:, :1], rest))
        return half.spread(shares)[:, None, :, None]


def rows_of(mask: Mask, start: int, stop: int) -> Mask:
    """The mask of some rows of the batch, of which each may have its own."""
    return Mask(*(x if x is None or len(x) == 1 else x[start:stop] for x in mask))


def _wide(mask: Mask | None) -> Mask | None:
    """A mask for float32, of which one of bools is one."""
    if mask is None or not mask.keys.is_floating_point():
        return mask
    return mask._replace(keys=mask.keys.float())


def _united(words: Tensor) -> Tensor:
    """The bits that any token of a row has, int32 [P, 1]."""
    found = torch.zeros_like(words[:, :1])
    for bit in _BITS:
        found |= torch.where(((words & bit) != 0).any(1, keepdim=True), bit, 0).to(torch.int32)
    return found
