"""FLUX.2 dev and klein: tokens as FLUX.1 has them, the text a chat."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .flux import Flux

if TYPE_CHECKING:
    from ..prompts.texts import Texts


class Flux2(Flux):
    """Flux2Transformer2DModel; a pipeline that keeps keys between steps has a record of its own."""

    denoiser = "Flux2Transformer2DModel"
    pipelines = "Flux2(Klein(Inpaint)?)?Pipeline"

    def text_places(self, places: Tensor, texts: Texts) -> Tensor:
        """The places of the regions' tokens [..., N, 4], whose last is a token's in its text."""
        places[..., 3] = texts.slots.positions(places.device)[texts.slots.own :].to(places)
        return places
