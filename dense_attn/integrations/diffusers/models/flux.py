"""FLUX.1: joint attention, text tokens first, and a call for each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

from .record import IMAGE, REFERENCES, TEXT, Attention, Call, Model, packed, unpacked

if TYPE_CHECKING:
    from ..prompts.texts import Texts


class Flux(Model):
    """FluxTransformer2DModel, whose single blocks have the tokens of both as one."""

    denoiser = "FluxTransformer2DModel"
    longer_text = True
    unit = 1e-3
    packs = 2
    branches = "calls"
    shifts = True
    attentions = (Attention("attn", (TEXT, IMAGE, REFERENCES)),)

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width.

        Rows and columns of tokens are counted, for bfloat16 rounds places past 256.
        """
        places = call.places
        if places.dim() == 3:
            places = places[0]  # as the transformer reads them
        own = places[places[:, 0] == 0]
        width = int((own[:, 1] == 0).sum())
        height = len(own) // max(width, 1)
        rows = torch.arange(height, dtype=torch.int64, device=own.device).repeat_interleave(width)
        if len(own) != height * width or not torch.equal(own[:, 1], rows.to(own.dtype)):
            rule = "number its image tokens row by row (img_ids)"
            _checks.refuse("pipe", rule, f"{len(own)} in rows of {width}")
        return 2 * height, 2 * width

    def arranged(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] as tokens."""
        return packed(latents)

    def pictured(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens as latents [B, C, H, W]."""
        return unpacked(latents, grid)

    def without_text(self, arguments: dict[str, Any]) -> bool:
        """Take a call's own text out, with its places."""
        self.write(arguments, arguments["encoder_hidden_states"][:, :0])
        arguments["txt_ids"] = arguments["txt_ids"][..., :0, :]
        return True

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's; the places of all begin anew."""
        super().lengthen(arguments, texts)
        places = arguments["txt_ids"]
        shape = *places.shape[:-2], texts.slots.count - texts.slots.own, places.shape[-1]
        more = self.text_places(places.new_zeros(shape), texts)
        arguments["txt_ids"] = torch.cat([places, more], -2)

    def text_places(self, places: Tensor, texts: Texts) -> Tensor:
        """The places of the regions' tokens, given as zeros [..., N, 3], which all texts have."""
        return places
