"""SkyReels V2: the attention of Wan, and pipelines that denoise all frames at once."""

from __future__ import annotations

from .wan import Wan


class SkyReels(Wan):
    """SkyReelsV2Transformer3DModel; diffusion forcing, a time for each frame, is another way."""

    denoiser = "SkyReelsV2Transformer3DModel"
    pipelines = "SkyReelsV2(ImageToVideo)?Pipeline"
