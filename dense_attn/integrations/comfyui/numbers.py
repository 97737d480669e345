"""The numbers of a layout: a model's own, times what a user says."""

from __future__ import annotations

from typing import NamedTuple

from ..diffusers.options.numbers import RANGE
from .models import Model


class Numbers(NamedTuple):
    """The numbers of one layout."""

    modulation: str
    cross_weight: float  # of image tokens towards the text
    self_weight: float  # towards the image, 0 where that is left alone
    text_weight: float  # of a region's text tokens, in joint attention
    size_weight: float
    exponent: float
    end: float
    backend: str

    @property
    def acts(self) -> bool:
        """Whether any row has a strength."""
        return bool(self.cross_weight or self.self_weight or self.text_weight)

    @classmethod
    def of(
        cls,
        model: Model,
        modulation: str,
        strength: float,
        self_strength: float,
        size_weight: float,
        backend: str,
    ) -> Numbers:
        """A model's numbers; those of another modulation than its own are DenseDiffusion's."""
        own = model.defaults if modulation == model.defaults.modulation else RANGE
        towards_image = "image->image" in own.blocks
        cross, towards = own.cross_weight * strength, (own.self_weight or 0.0) * self_strength
        return cls(
            modulation,
            towards if model.joint and towards_image else cross,  # a row has one strength
            towards if towards_image else 0.0,
            cross if "text->image" in own.blocks else 0.0,
            size_weight,
            own.exponent,
            own.active,
            backend,
        )
