"""Kandinsky 5: self-attention of images or videos, cross-attention to text, two calls a step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

from ..record import IMAGE, TEXT, Attention, Call, Model

if TYPE_CHECKING:
    from ...prompts.texts import Texts

BLOCK = r"visual_transformer_blocks\.\d+\."


class Kandinsky5(Model):
    """Kandinsky5Transformer3DModel, whose blocks of the text alone are left alone."""

    denoiser = "Kandinsky5Transformer3DModel"
    video = True
    branches = "calls"
    sees_images = True
    attentions = (
        Attention(f"{BLOCK}self_attention", (IMAGE,)),
        Attention(f"{BLOCK}cross_attention", (IMAGE,), (TEXT,)),
    )
    text_layers = r"^text_transformer_blocks\.\d+\.self_attention$"

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> Model:
        """The record of one that attends to all tokens, in their order."""
        kind = denoiser.config.attention_type
        if kind != "regular":
            _checks.refuse("pipe", 'have a transformer of attention_type "regular"', repr(kind))
        made = Kandinsky5WithRoom if denoiser.config.visual_cond else cls
        return super().of.__func__(made, denoiser)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, with the channels of latents before their frames."""
        call = super().read(arguments)
        return call._replace(latents=call.latents.movedim(-1, 1))

    def arranged(self, latents: Tensor) -> Tensor:
        """Latents, of images as of one frame, as a video [B, F, H, W, C]."""
        return (latents if latents.dim() == 5 else latents.unsqueeze(2)).movedim(1, -1)

    def pictured(self, latents: Tensor, grid: tuple[int, int]) -> Tensor:
        """A video [B, F, H, W, C] as latents [B, C, F, H, W]."""
        return latents.movedim(-1, 1)

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's; the places of all begin anew."""
        super().lengthen(arguments, texts)
        places = arguments["text_rope_pos"]
        arguments["text_rope_pos"] = texts.slots.positions(places.device).to(places)


class Kandinsky5WithRoom(Kandinsky5):
    """One whose calls have room for an image behind the latents."""

    room = -1
