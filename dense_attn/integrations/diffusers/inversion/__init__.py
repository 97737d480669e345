"""invert, reconstruct and optimize: reversible sampling of a pipeline's images."""

from .optimizing import Optimized, optimize
from .round_trip import Inversion, invert, reconstruct
from .shared import measured

__all__ = ["Inversion", "Optimized", "invert", "measured", "optimize", "reconstruct"]
