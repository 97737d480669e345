"""CogView4: joint attention, the text behind its padding and then the image, two calls a step."""

from __future__ import annotations

from .record import IMAGE, TEXT, Attention, Model


class CogView4(Model):
    """CogView4Transformer2DModel; its mask of 1 and 0 removes no token, and is added as it is."""

    denoiser = "CogView4Transformer2DModel"
    branches = "calls"
    attentions = (Attention("attn1", (TEXT, IMAGE)),)
    longer_text = True  # tokens of the text have no places
