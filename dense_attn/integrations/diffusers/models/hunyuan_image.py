"""HunyuanImage 2.1: joint attention, the image before the text, whose padding comes last of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layers import Side, joined
from ..rows import counted
from .record import IMAGE, TEXT, Attention, Call, Entry
from .refined import Refined, all_there, at_begin

if TYPE_CHECKING:
    from dense_attn import Layout

    from ..prompts.texts import Texts
    from ..state import LayoutState

QUOTED = "encoder_hidden_states_2", "encoder_attention_mask_2"


class HunyuanImage(Refined):
    """HunyuanImageTransformer2DModel, which puts tokens that are there before those that are not.

    Quoted words are read by an encoder of their own; its tokens come first and have no region, but
    those of a region's own prompt. No layout touches the refiner of the text alone.
    """

    denoiser = "HunyuanImageTransformer2DModel"
    pipelines = "HunyuanImagePipeline"
    branches = "calls"
    attentions = (Attention(r"(single_)?transformer_blocks\.\d+\.attn", (IMAGE, TEXT)),)

    masks = "encoder_attention_mask", "encoder_attention_mask_2"

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, with what says which tokens are there."""
        masks = arguments["encoder_attention_mask_2"], arguments["encoder_attention_mask"]
        return super().read(arguments)._replace(places=masks)

    def there(self, places: tuple[Tensor, ...]) -> Tensor:
        """Which tokens are there, those of the prompt behind others: bool [B, N]."""
        return torch.cat([mask.bool() for mask in places], 1)

    def second_text(self, arguments: dict[str, Any]) -> tuple[Tensor, list[int]]:
        """The tokens of a call's quoted words [B, L, C], and how many are there in each row."""
        tokens, mask = (arguments[name] for name in QUOTED)
        return at_begin(tokens, mask), counted(mask)

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's, and their quoted words behind its own."""
        super().lengthen(arguments, texts)
        quoted, mask = QUOTED
        arguments[quoted] = texts.second.tokens
        arguments[mask] = all_there(arguments[mask], texts.second)

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """Every kind of attention layers, with the text in its order there."""
        there = self.there(call.places)
        there = there[:: len(there) // len(layouts)]  # a prompt's images have one text
        others = state.other_side(layouts, there.shape[1] - text.words.shape[1])
        order = (~there).byte().argsort(dim=1, stable=True)
        side = Side(*(x.gather(1, order) for x in joined(others, text)))
        return super().layers(state, layouts, side, call)
