"""HunyuanVideo 1.5: joint attention, the video before an image's tokens and two encoders'."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..hunyuan_image import HunyuanImage
from ..record import Call


class HunyuanVideo15(HunyuanImage):
    """HunyuanVideo15Transformer3DModel; an image of zeros is none, and its tokens come last."""

    denoiser = "HunyuanVideo15Transformer3DModel"
    pipelines = "HunyuanVideo15(ImageToVideo)?Pipeline"
    video = True
    room = 1
    masks = (*HunyuanImage.masks, "image_embeds")

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call, with what says which tokens are there."""
        call = super().read(arguments)
        return call._replace(places=(arguments["image_embeds"], *call.places))

    def there(self, places: tuple[Tensor, ...]) -> Tensor:
        """Which tokens are there, those of the prompt behind others: bool [B, N]."""
        image, *masks = places
        own = (image != 0).any().expand(len(masks[0]), image.shape[1])
        return torch.cat([own, super().there(masks)], 1)
