"""HunyuanDiT: cross-attention from the image to the tokens of two encoders, one after the other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...text.encoding import beside
from ..record import IMAGE, TEXT, Attention, Call, Model

ENCODED = "encoder_hidden_states", "encoder_hidden_states_t5"


class HunyuanDiT(Model):
    """HunyuanDiT2DModel, which is given the tokens of each encoder by themselves."""

    denoiser = "HunyuanDiT2DModel"
    longer_text = False  # all tokens of the second encoder are pooled too
    attentions = Attention("attn1", (IMAGE,)), Attention("attn2", (IMAGE,), (TEXT,))

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, of the tokens of both."""
        first, second = (arguments[name] for name in ENCODED)
        return super().read(arguments)._replace(text=beside(first, second))

    def write(self, arguments: dict[str, Any], text: Tensor) -> None:
        """Put text tokens [B, L, C] into a call, in the width of each encoder."""
        start = 0
        for name in ENCODED:
            _, length, width = arguments[name].shape
            arguments[name] = text[:, start : start + length, :width].contiguous()
            start += length
