"""Chroma: FLUX's attention and tokens, with a mask of pairs that is added to their scores."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .flux import Flux

if TYPE_CHECKING:
    from ..prompts.texts import Texts


class Chroma(Flux):
    """ChromaTransformer2DModel; its mask of 1 and 0 removes no token, and is added as it is."""

    denoiser = "ChromaTransformer2DModel"
    text_mask = "attention_mask"  # of the text and the image
    keeps_padding = True
    masks = ("attention_mask",)

    def without_text(self, arguments: dict[str, Any]) -> bool:
        """Take a call's own text out, also of the mask of all tokens."""
        count, mask = arguments["encoder_hidden_states"].shape[1], arguments["attention_mask"]
        if mask is not None:
            arguments["attention_mask"] = mask[:, count:]
        return super().without_text(arguments)

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's, and in its mask before the image."""
        mask = arguments["attention_mask"]
        super().lengthen(arguments, texts)
        if mask is not None:
            image = mask[:, texts.slots.own :]
            arguments["attention_mask"] = torch.cat([arguments["attention_mask"], image], 1)
