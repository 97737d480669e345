"""Attention layers of one kind and size: their tokens' words, and what is kept over their calls."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dense_attn import layout_attention, tile_lists

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
    """The tile lists of layers of one kind and size, made once for each shape and mask.

    Those of a mask live as long as it does, or the tensor that it is a view of, and are made again
    where it has changed in place.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple, Any] = {}
        self._of_masks = WeakTensorKeyDictionary()

    def of(self, layer: Layer, q: Tensor, k: Tensor, mask: Tensor | None, backend: str) -> Any:
        """The lists of a layer's call; None where there are none, or none that could be kept."""
        kept, form = self._kept, None
        if mask is not None:
            if mask.is_inference():  # its changes are not counted
                return None
            owner = mask._base if mask._is_view() else mask
            kept = self._of_masks.setdefault(owner, {})
            form = mask.shape, mask.dtype, mask.stride(), mask.storage_offset(), mask._version
        shape = q.shape, k.shape, q.dtype
        if (found := kept.get(shape)) is None or found[0] != form:
            words = layer.q_words, layer.k_words
            made = tile_lists(q, k, *words, k_mask=mask, backend=backend)
            kept[shape] = found = form, made
        return found[1]


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
            lists = self.lists.of(self, q, k, k_mask, options.backend)
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
