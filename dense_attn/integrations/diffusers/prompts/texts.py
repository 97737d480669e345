"""The text tokens of a call with regions: its own, and behind them a slot for each region's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention.layout import _BITS

from .reading import Text


class Span(NamedTuple):
    """Rows of the batch that see the prompt, or the negative one."""

    start: int
    stop: int
    positive: bool


@dataclass(frozen=True)
class Slots:
    """Where the texts of a call stand: a slot begins at the same token in all rows of the batch.

    Args:
        sizes: tokens of each slot, first the call's own, which has none where no token sees it.
        lengths: of each row, the tokens of its text in each slot.
        multiple: padding, which is seen as the text is, makes the tokens of each a multiple of it.
        longest: of each row, the tokens of the longest text that its image sees, with padding.
        second: the slots of what another encoder reads of the same texts, which come before these.
    """

    sizes: tuple[int, ...]
    lengths: tuple[tuple[int, ...], ...]
    multiple: int
    longest: tuple[int, ...]
    second: Slots | None = None

    @property
    def own(self) -> int:
        """The size of the call's own slot."""
        return self.sizes[0]

    @property
    def count(self) -> int:
        """The tokens of all slots."""
        return sum(self.sizes)

    @property
    def total(self) -> int:
        """The tokens of all slots of both encoders."""
        return self.count + (0 if self.second is None else self.second.count)

    def words(self, rows: list[int]) -> Tensor:
        """The bit of each token's text in some rows, int32 [P, N]; 0 behind the end of a text."""
        own = words([self.lengths[row] for row in rows], self.sizes, self.multiple)
        return own if self.second is None else torch.cat([self.second.words(rows), own], 1)

    def positions(self, device: torch.device | str) -> Tensor:
        """The place of each token in its slot, int64 [N]: every text begins at 0."""
        return torch.cat([torch.arange(n, dtype=torch.int64, device=device) for n in self.sizes])

    def padding(self, row: int, device: torch.device | str) -> Tensor:
        """The tokens of a row that are of no text, bool [N]."""
        lengths = torch.tensor(self.lengths[row], dtype=torch.int64, device=device)
        sizes = torch.tensor(self.sizes, dtype=torch.int64, device=device)
        return self.positions(device) >= lengths.repeat_interleave(sizes)


@dataclass(frozen=True, eq=False)
class Texts:
    """The tokens in their slots."""

    slots: Slots
    tokens: Tensor  # [B, N, C]
    mask: Tensor  # bool [B, N - own], of the regions' texts, True but for padding that is kept
    second: Texts | None = None  # as another encoder reads them

    def as_rows(self) -> Tensor:
        """The tokens with each slot's as rows of their own, [R * B, L, C], the call's first.

        A slot of no text, which is a region's that sees the call's, has no rows.
        """
        own, *others = self.slots.sizes
        for size in set(others) - {own, 0}:
            rule = f"have the {size} tokens of a text beside those of regions"
            _checks.refuse("prompt_embeds", rule, own)
        return self.rows_of(self.tokens)

    def rows_of(self, values: Tensor) -> Tensor:
        """Values of tokens of slots of one size [B, R * L, ...] as rows [R * B, L, ...]."""
        return values.unflatten(1, (-1, self.slots.own)).transpose(0, 1).flatten(0, 1)


def up(length: int, multiple: int) -> int:
    """The next multiple from a length on."""
    return length + -length % multiple


def words(lengths: list[tuple[int, ...]], sizes: tuple[int, ...], multiple: int) -> Tensor:
    """The bit of each token's text, int32 [P, N]; 0 behind the end of a text."""
    found = torch.zeros(len(lengths), sum(sizes), dtype=torch.int32, device="cpu")
    for row, own in zip(found, lengths):
        begin = 0
        for bit, length, size in zip(_BITS, own, sizes):
            row[begin : begin + up(length, multiple)] = bit
            begin += size
    return found


def written(text: Tensor, slots: Slots, rows: list[list[Text | None]], keep_padding: bool) -> Texts:
    """The call's text [B, L, C], and the texts of each row's regions, in their slots."""
    tokens, first = text.new_zeros(len(text), slots.count, text.shape[2]), text[:, : slots.own]
    tokens[:, : first.shape[1]] = first
    shape = len(text), slots.count - slots.own
    mask = torch.ones(shape, dtype=torch.bool, device=text.device)
    for b, row in enumerate(rows):
        begin = slots.own
        for one, size in zip(row, slots.sizes[1:]):
            if one is not None:
                own = one.tokens if keep_padding else one.bare
                tokens[b, begin : begin + len(own)] = own.to(text)
                if keep_padding and one.mask is not None:
                    mask[b, begin - slots.own :][: len(own)] = one.mask.to(mask.device)
            begin += size
    return Texts(slots, tokens, mask)
