"""Stable Diffusion 3: joint attention, image tokens first, and the image's own in some blocks."""

from __future__ import annotations

from .record import IMAGE, TEXT, Attention, Model


class SD3(Model):
    """SD3Transformer2DModel."""

    denoiser = "SD3Transformer2DModel"
    shifts = True
    longer_text = True  # tokens of the text have no places
    attentions = Attention("attn", (IMAGE, TEXT)), Attention("attn2", (IMAGE,))
