"""AuraFlow: joint attention, eight registers and the text before the image."""

from __future__ import annotations

from .record import IMAGE, TEXT, Attention, Model, registers


class AuraFlow(Model):
    """AuraFlowTransformer2DModel, whose pipeline says in `encode_prompt` alone that it guides."""

    denoiser = "AuraFlowTransformer2DModel"
    longer_text = True  # tokens of the text have no places
    unit = 1e-3
    hears_guidance = True
    upcasts = True
    attentions = (Attention("attn", (registers(8), TEXT, IMAGE)),)
