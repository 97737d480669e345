"""One line on a diffusers pipeline: layouts, guidance, inversion and latent optimisation."""

from ..edits import Edit
from .guidance import semantic_guidance
from .guidance.guider import semantic_guider
from .inversion import Inversion, Optimized, invert, optimize, reconstruct
from .layouts import apply_layout
from .prompts.region import Region
from .text.phrases import Phrase

__all__ = [
    "Edit",
    "Inversion",
    "Optimized",
    "Phrase",
    "Region",
    "apply_layout",
    "invert",
    "optimize",
    "reconstruct",
    "semantic_guidance",
    "semantic_guider",
]
