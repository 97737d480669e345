"""The blocks of pairs that a layout touches: from text or image tokens to those of either."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention.layout import MAX_REGIONS

if TYPE_CHECKING:
    from ..layers import Side
    from ..regions import Regions

# from queries to keys
BLOCKS = ("image->text", "text->image", "image->image", "text->text")
EVERY = -1  # all bits of a word
HALF = MAX_REGIONS // 2


def parse(blocks: object) -> tuple[str, ...]:
    """The blocks of a user's list, or of one name, in one order."""
    names = (blocks,) if isinstance(blocks, str) else blocks
    if (
        not isinstance(names, Collection)
        or not names
        or not all(isinstance(name, str) and name in BLOCKS for name in names)
    ):
        _checks.refuse("blocks", f"name one or more of {', '.join(BLOCKS)}", repr(blocks))
    return tuple(block for block in BLOCKS if block in names)


def check_count(blocks: tuple[str, ...], count: int) -> None:
    """Refuse more regions than a word has bits for."""
    if count > HALF and not _one_bit(blocks):
        rule = f"hold at most {HALF} regions, of two bits each, under blocks={blocks!r}"
        _checks.refuse("regions", rule, count)


def check_phrases(blocks: tuple[str, ...], modulation: str, images: list[Regions]) -> None:
    """Warn of an image whose regions have no phrase where these pairs alone would change."""
    idle = any(not any(image.phrases) for image in images)
    if idle and modulation != "range" and "image->image" not in blocks:
        text = f"regions without a phrase change nothing under blocks={blocks!r}"
        warnings.warn(f"{text}: image->image is theirs", stacklevel=5)


def rows_of(blocks: tuple[str, ...], column: str) -> set[str]:
    """The kinds of queries that blocks touch towards one kind of keys."""
    pairs = (block.split("->") for block in blocks)
    return {row for row, other in pairs if other == column}


def _one_bit(blocks: tuple[str, ...]) -> bool:
    """Whether all rows that are touched are so towards the same columns."""
    text, image = rows_of(blocks, "text"), rows_of(blocks, "image")
    return text == image or not text or not image


def words(q: Side, k: Side, blocks: tuple[str, ...], masked: bool) -> tuple[Tensor, Tensor]:
    """Words of queries and keys [P, M], [P, N] that meet in pairs of a region and of the blocks.

    With `masked` those of other blocks meet too, and those of tokens of no region. A region has one
    bit, or where that does not do one for text keys, in the lower half, and one for image keys.
    """
    if _one_bit(blocks):
        columns = {kind for kind in ("text", "image") if rows_of(blocks, kind)}
        rows = set().union(*(rows_of(blocks, kind) for kind in columns))
        return _kept(q, rows, masked, EVERY), _kept(k, columns, masked, EVERY)
    q_words, k_words = torch.zeros_like(q.words), torch.zeros_like(k.words)
    for kind, shift in (("text", 0), ("image", HALF)):
        q_words |= _kept(q, rows_of(blocks, kind), masked, (1 << HALF) - 1) << shift
        half = _kept(k, {kind}, masked, (1 << HALF) - 1) << shift
        k_words |= torch.where(k.text == (kind == "text"), half, 0)
    return q_words, k_words


def _kept(side: Side, kinds: set[str], masked: bool, every: int) -> Tensor:
    """A side's words in tokens of these kinds, elsewhere none; under a mask `every` for none."""
    kept = torch.where(torch.where(side.text, "text" in kinds, "image" in kinds), side.words, 0)
    return torch.where(kept == 0, every, kept) if masked else kept
