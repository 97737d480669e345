"""Attention layers of one kind and size: their tokens' words, and what is kept over their calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import layout_attention, tile_lists
from dense_attn.layout_attention import keys
from dense_attn.layout_attention.kept import Kept

if TYPE_CHECKING:
    from .options.numbers import Options


class Side(NamedTuple):
    """The queries or keys of attention: region words, and strengths at time 1."""

    words: Tensor  # int32 [P, N]
    strength: Tensor  # float32 [P, N]
    text: Tensor | None = None  # bool [P, N], where a token is of the text; None where none asks


def joined(*sides: Side) -> Side:
    """The tokens of several sides, one after the other."""
    return Side(*(torch.cat(tensors, 1) for tensors in zip(*sides)))


def order_of(side: Side) -> Tensor:
    """The order in which tokens of one region word stand together."""
    return side.words.argsort(dim=1, stable=True).to(torch.int32)


class Lists:
    """The tile lists of layers of one kind and size, made once for each shape and mask."""

    def __init__(self) -> None:
        self._kept: dict[tuple, Any] = {}  # without a mask
        self.of_masks = Kept()

    def of(
        self, layer: Layer, q: Tensor, k: Tensor, mask: Tensor | None, k_mask: Any, backend: str
    ) -> Any:
        """The lists of a layer's call; None where there are none, or none that could be kept.

        `k_mask`: what calls take of the mask.
        """

        def make() -> Any:
            words = layer.q_words, layer.k_words
            return tile_lists(q, k, *words, k_mask=k_mask, backend=backend)

        shape = q.shape, k.shape, q.dtype
        if mask is not None:
            return None if mask.is_inference() else self.of_masks.of(mask, shape, make)
        if shape not in self._kept:
            self._kept[shape] = make()
        return self._kept[shape]


@dataclass(eq=False)
class Layer:
    """The arguments of `layout_attention` beside q, k and v, as layers take them."""

    q_words: Tensor  # int32 [B|1, M]
    k_words: Tensor  # int32 [B|1, N]
    strength: Tensor  # float32 [B|1, 1, M], at time 1
    q_order: Tensor  # int32 [B|1, M]
    k_order: Tensor | None  # int32 [B|1, N], where queries and keys are the same tokens
    now: Tensor | None = None  # the strength of this step
    lists: Lists = field(default_factory=Lists)
    _spread: tuple[Any, ...] = None, None, None  # that strength, q's shape, and a view for its rows

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        options: Options,
        scale: float | None,
        k_mask: Tensor | None = None,
    ) -> Tensor:
        """Modulated attention of q, k, v [B, H, tokens, D] of the rows that see the prompt."""
        if torch.compiler.is_compiling():  # a graph keeps nothing
            words, strength = (self.q_words, self.k_words), self.now
            lists = tile_lists(q, k, *words, backend=options.backend) if k_mask is None else None
        else:
            mask, k_mask = k_mask, k_mask if k_mask is None else keys.kept(k_mask, q, k)
            lists = self.lists.of(self, q, k, mask, k_mask, options.backend)
            strength = self._strength(q)
        return layout_attention(
            q,
            k,
            v,
            self.q_words,
            self.k_words,
            strength,
            modulation=options.modulation,
            scale=scale,
            k_mask=k_mask,
            tile_lists=lists,  # which have orders of their own
            q_order=self.q_order if lists is None else None,
            k_order=self.k_order if lists is None else None,
            backend=options.backend,
        )

    def _strength(self, q: Tensor) -> Tensor:
        """The strength of this step as a view [B, H, M], made once for all layers and calls."""
        now, shape, spread = self._spread
        if now is not self.now or shape != q.shape:
            spread = self.now.expand(q.shape[:3])
            self._spread = self.now, q.shape, spread
        return spread
