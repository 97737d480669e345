"""HunyuanVideo: joint attention, the video before the text, whose padding a mask removes."""

from __future__ import annotations

from ..record import IMAGE, TEXT, Attention, Model


class HunyuanVideo(Model):
    """HunyuanVideoTransformer3DModel, of double and single blocks.

    The refiner of the text alone is left alone.
    """

    denoiser = "HunyuanVideoTransformer3DModel"
    video = True
    branches = "calls"
    attentions = (Attention(r"(single_)?transformer_blocks\.\d+\.attn", (IMAGE, TEXT)),)
