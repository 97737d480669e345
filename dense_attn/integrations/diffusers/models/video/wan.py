"""Wan: self-attention of a video, cross-attention from it to the text, a call for each prompt."""

from __future__ import annotations

from ..record import IMAGE, TEXT, Attention, Model


class Wan(Model):
    """WanTransformer3DModel; the image that a video begins with is another call of `attn2`."""

    denoiser = "WanTransformer3DModel"
    video = True
    branches = "calls"
    attentions = Attention("attn1", (IMAGE,)), Attention("attn2", (IMAGE,), (TEXT,))
