"""ChronoEdit: the attention of Wan, on an image and what becomes of it as frames."""

from __future__ import annotations

from .wan import Wan


class ChronoEdit(Wan):
    """ChronoEditTransformer3DModel, whose frames between may be left out in the later steps."""

    denoiser = "ChronoEditTransformer3DModel"
    video = False  # it makes an image
