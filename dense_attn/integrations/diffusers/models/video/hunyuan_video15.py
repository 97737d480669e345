"""HunyuanVideo 1.5: joint attention, the video before an image's tokens and two encoders'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hunyuan_image import HunyuanImage
from ..record import IMAGE, TEXT, Attention, Call, registers

if TYPE_CHECKING:
    from ...prompts.texts import Texts


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

    def attentions_of(self, call: Call) -> tuple[Attention, ...]:
        """The kinds of a call's layers while regions have prompts: an image's tokens come first."""
        image = call.places[0]
        count = image.shape[1] if _is_one(image) else 0
        return tuple(
            each._replace(queries=(IMAGE, registers(count), TEXT)) for each in self.attentions
        )

    def lengthen(self, arguments: dict[str, Any], texts: Texts) -> None:
        """Put the texts of regions behind a call's, without the tokens of no image."""
        super().lengthen(arguments, texts)
        image = arguments["image_embeds"]
        if not _is_one(image):
            arguments["image_embeds"] = image[:, :0]

    def there(self, places: tuple[Tensor, ...]) -> Tensor:
        """Which tokens are there, those of the prompt behind others: bool [B, N]."""
        image, *masks = places
        own = _is_one(image).expand(len(masks[0]), image.shape[1])
        return torch.cat([own, super().there(masks)], 1)


def _is_one(image: Tensor) -> Tensor:
    """Whether the tokens of an image are those of one, as the denoiser tells."""
    return (image != 0).any()
