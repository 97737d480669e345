"""SANA: cross-attention from the image to the text; its self-attention is linear, not scored."""

from __future__ import annotations

from ..record import IMAGE, TEXT, Attention, Model


class Sana(Model):
    """SanaTransformer2DModel, whose `attn1` is left alone; Sprint's calls count time in angles."""

    denoiser = "SanaTransformer2DModel"
    pipelines = "Sana(ControlNet)?Pipeline"
    attentions = (Attention("attn2", (IMAGE,), (TEXT,)),)
