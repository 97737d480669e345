"""The layers of a call by the numbers of their tokens, made once a size and kept over steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention.masks import Mask

from ..diffusers.models.record import Attention
from ..diffusers.prompts.blocks import Blocks, Rule
from .models import CROSS, JOINED, SELF, Model


class Place(NamedTuple):
    """A kind and size of layers."""

    attention: Attention
    grid: tuple[int, int, int]  # frames, rows and columns of image tokens
    others: int = 0  # tokens behind the image's: those of reference images


@dataclass(eq=False)
class Part:
    """Layers of one kind and size, for rows that see the prompt."""

    blocks: Blocks
    rule: Rule
    same_tokens: bool
    factor: float = 1.0  # that the strengths have now

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Mask | None, factor: float
    ) -> Tensor:
        """Attention of q, k, v [B, H, N, D] as [B, H, M, D]; factor: of the strengths, by time."""
        if factor != self.factor:
            for layer, _ in self.blocks.calls:
                layer.now = layer.strength * factor
            self.factor = factor
        return self.blocks.attention(q, k, v, scale, mask, 0, self.rule)


# the blocks of a place, for a number of rows, and their rule; None where it is left alone
Make = Callable[[Place, tuple[int, ...], int, torch.device], "tuple[Blocks, Rule] | None"]


@dataclass(eq=False)
class Parts:
    """All of a call's layers."""

    model: Model
    grid: tuple[int, int, int]  # of the latents' tokens
    sizes: tuple[int, ...]  # tokens of the call's own text and of each region's
    make: Make
    _made: dict[tuple[Any, ...], Part | None] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """The tokens of the latents."""
        return prod(self.grid)

    @property
    def text(self) -> int:
        """The tokens of all texts."""
        return sum(self.sizes)

    def _place(self, queries: int, keys: int, options: dict[str, Any]) -> Place | None:
        """The kind and size of a layer by its numbers of tokens; None where it is left alone."""
        grid = self.grid
        if self.model.nested:
            shape = (options.get("transformer_options") or {}).get("activations_shape")
            if shape is None:
                return None
            grid = (1, *shape[-2:])
        image = prod(grid)
        if queries != image:
            others = queries - self.text - image
            joined = JOINED in self.model.attentions and queries == keys and others >= 0
            return Place(JOINED, grid, others) if joined else None
        if keys == image == self.text and CROSS in self.model.attentions:
            rule = "be of a size whose number of tokens is not that of the text"
            _checks.refuse("latent", rule, image)
        kind = SELF if keys == image else CROSS if keys == self.text else None
        return Place(kind, grid) if kind in self.model.attentions else None

    def at(
        self, queries: int, keys: int, options: dict[str, Any], rows: int, device: torch.device
    ) -> Part | None:
        """A layer of these numbers of tokens, made at the first call; None if it is left alone."""
        place = self._place(queries, keys, options)
        if place is None:
            return None
        key = place, rows, device
        if (part := self._made.get(key, key)) is key:
            made = self.make(place, self.sizes, rows, device)
            same = place.attention.keys is None
            self._made[key] = part = None if made is None else Part(*made, same)
        return part

    def texts_of(self, keys: int | None) -> tuple[int, int] | None:
        """The tokens of the call's own text and of all, where keys begin with them."""
        if keys is None:
            return None
        crossed = CROSS in self.model.attentions and keys == self.text
        joined = JOINED in self.model.attentions and keys >= self.text + self.tokens
        return (self.sizes[0], self.text) if crossed or joined else None
