"""Chroma: FLUX's attention and tokens, with a mask of pairs that is added to their scores."""

from __future__ import annotations

from .flux import Flux


class Chroma(Flux):
    """ChromaTransformer2DModel; its mask of 1 and 0 removes no token, and is added as it is."""

    denoiser = "ChromaTransformer2DModel"
