"""PixArt: self-attention of the image, cross-attention from it to the words of the text."""

from __future__ import annotations

from ..record import IMAGE, TEXT, Attention, Model


class PixArt(Model):
    """PixArtTransformer2DModel, whose pipelines say in `encode_prompt` alone that they guide."""

    denoiser = "PixArtTransformer2DModel"
    hears_guidance = True
    attentions = Attention("attn1", (IMAGE,)), Attention("attn2", (IMAGE,), (TEXT,))
