"""HunyuanVideo: joint attention, the video before the text, whose padding a mask removes."""

from __future__ import annotations

from ..record import IMAGE, TEXT, Attention
from ..refined import Refined


class HunyuanVideo(Refined):
    """HunyuanVideoTransformer3DModel, of double and single blocks.

    No layout touches the refiner of the text alone.
    """

    denoiser = "HunyuanVideoTransformer3DModel"
    video = True
    branches = "calls"
    attentions = (Attention(r"(single_)?transformer_blocks\.\d+\.attn", (IMAGE, TEXT)),)
