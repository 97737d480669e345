"""Kandinsky 5: self-attention of images or videos, cross-attention to text, two calls a step."""

from __future__ import annotations

from typing import Any

import torch

from dense_attn import _checks

from ..record import IMAGE, TEXT, Attention, Call, Model

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

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> Model:
        """The record of one that attends to all tokens, in their order."""
        kind = denoiser.config.attention_type
        if kind != "regular":
            _checks.refuse("pipe", 'have a transformer of attention_type "regular"', repr(kind))
        return super().of(denoiser)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, with the channels of latents before their frames."""
        call = super().read(arguments)
        return call._replace(latents=call.latents.movedim(-1, 1))
