"""Fused kernels for controlling pre-trained diffusion models without training."""

from dense_attn._backends import backends
from dense_attn.ddim import ddim_step, ddim_step_inverse
from dense_attn.layout import Layout
from dense_attn.layout_attention import layout_attention, tile_lists
from dense_attn.optimize import OptimizeResult, optimize_latents
from dense_attn.reversible import ReversibleSampler
from dense_attn.saliency import spectral_residual_saliency
from dense_attn.sega import percentile_mask, sega_guidance
from dense_attn.semantic_guidance import SemanticGuidance

__version__ = "0.1.0"
__all__ = [
    "Layout",
    "OptimizeResult",
    "ReversibleSampler",
    "SemanticGuidance",
    "backends",
    "ddim_step",
    "ddim_step_inverse",
    "layout_attention",
    "optimize_latents",
    "percentile_mask",
    "sega_guidance",
    "spectral_residual_saliency",
    "tile_lists",
]
