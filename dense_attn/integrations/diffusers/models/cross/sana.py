"""SANA: cross-attention from the image to the text; its self-attention is linear, not scored."""

from __future__ import annotations

from typing import Any

import torch

from ..record import IMAGE, TEXT, Attention, Call, Model


class Sana(Model):
    """SanaTransformer2DModel, whose `attn1` is left alone; Sprint's pipelines never guide."""

    denoiser = "SanaTransformer2DModel"
    pipelines = "Sana(ControlNet|Sprint|SprintImg2Img)?Pipeline"
    hears_guidance = True
    attentions = (Attention("attn2", (IMAGE,), (TEXT,)),)

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call; Sprint's scheduler has angles, of which it tells a ratio."""
        call = super().read(arguments)
        if arguments.get("guidance") is None:
            return call
        return call._replace(timestep=torch.atan2(call.timestep, 1 - call.timestep))
