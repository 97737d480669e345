"""Optimisation of the noise that a chain starts from: DOODL's loop, SGOOL's loss, and saliency."""

from dense_attn.optimize.loop import OptimizeResult, optimize_latents
from dense_attn.optimize.saliency import spectral_residual_saliency

__all__ = ["OptimizeResult", "optimize_latents", "spectral_residual_saliency"]
