"""Wan: self-attention of a video, cross-attention from it to the text, a call for each prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dense_attn import _checks

from ..record import IMAGE, TEXT, Attention, Model

if TYPE_CHECKING:
    from ...prompts.texts import Texts


class Wan(Model):
    """WanTransformer3DModel; the image that a video begins with is another call of `attn2`."""

    denoiser = "WanTransformer3DModel"
    video = True
    branches = "calls"
    attentions = Attention("attn1", (IMAGE,)), Attention("attn2", (IMAGE,), (TEXT,))

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's; an image's keys stand 512 before the end."""
        if arguments.get("encoder_hidden_states_image") is not None:
            rule = "be None for a WanTransformer3DModel while regions have prompts"
            _checks.refuse("encoder_hidden_states_image", rule, "an image")
        super().lengthen(arguments, texts)
