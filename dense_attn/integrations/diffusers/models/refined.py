"""Models with a refiner of their own for a text, which sees all of it and its mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..rows import counted
from .record import Model

if TYPE_CHECKING:
    from ..prompts.texts import Slots, Texts

MASK = "encoder_attention_mask"


class Refined(Model):
    """A transformer with a `context_embedder` of tokens, a time and a mask of tokens there.

    It refines each text of a call with regions by itself, as if it were alone. Behind it tokens of
    a text have no places, and words tell texts from padding, so no mask leaves a token out.
    """

    longer_text = True
    words_alone = True
    numbering = "context_embedder", "forward"

    def own_text(self, arguments: dict[str, Any], text: Tensor) -> tuple[Tensor, list[int]]:
        """A call's text [B, L, C] with the tokens that are there at its begin, and their number."""
        return at_begin(text, arguments[MASK]), counted(arguments[MASK])

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's."""
        self.write(arguments, texts.tokens)
        arguments[MASK] = all_there(arguments[MASK], texts)

    def numbered(
        self, own: Any, slots: Slots, tokens: Tensor, timestep: Tensor, mask: Tensor
    ) -> Tensor:
        """The texts refined one by one; a slot that a row has no text for has one token there."""
        padding = torch.stack([slots.padding(row, tokens.device) for row in range(len(tokens))])
        made = []
        for text, there in zip(tokens.split(slots.sizes, 1), (~padding).split(slots.sizes, 1)):
            if text.shape[1]:
                first = ~there.any(1, keepdim=True)
                there = torch.cat([there[:, :1] | first, there[:, 1:]], 1)
                made.append(own(text, timestep, there))
        return torch.cat(made, 1)


def at_begin(tokens: Tensor, mask: Tensor) -> Tensor:
    """Tokens [B, L, C] in the order in which those of a mask [B, L] come first."""
    order = (~mask.bool()).byte().argsort(dim=1, stable=True)
    return tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2]))


def all_there(mask: Tensor, texts: Texts) -> Tensor:
    """A mask like a call's, [B, L], that leaves out none of the texts' tokens [B, N]."""
    return mask.new_ones(len(mask), texts.slots.count)
