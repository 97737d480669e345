"""FLUX.2 dev and klein: tokens as FLUX.1 has them, the text a chat."""

from __future__ import annotations

from .flux import Flux


class Flux2(Flux):
    """Flux2Transformer2DModel; another pipeline (KV) keeps keys between steps."""

    denoiser = "Flux2Transformer2DModel"
    pipelines = "Flux2(Klein(Inpaint)?)?Pipeline"
