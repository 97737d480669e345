"""FLUX.2 klein: tokens as FLUX.1 has them, the text a chat of one message."""

from __future__ import annotations

from .flux import Flux


class Flux2(Flux):
    """Flux2Transformer2DModel; others keep keys between steps, or read prompts elsewise."""

    denoiser = "Flux2Transformer2DModel"
    pipelines = "Flux2Klein(Inpaint)?Pipeline"
