"""CogVideoX: joint attention, the text before the video, in two halves of a batch."""

from __future__ import annotations

from ..record import IMAGE, TEXT, Attention, Call, Model


class CogVideoX(Model):
    """CogVideoXTransformer3DModel, whose latents have frames before channels.

    Its pipelines say in `encode_prompt` alone that they guide.
    """

    denoiser = "CogVideoXTransformer3DModel"
    video = True
    hears_guidance = True
    attentions = (Attention("attn1", (TEXT, IMAGE)),)

    def length(self, call: Call) -> int:
        """The latents' frames."""
        return call.latents.shape[1]
