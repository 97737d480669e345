"""Fused kernels for controlling pre-trained diffusion models without training."""

from dense_attn._backends.table import backends
from dense_attn.layout_attention import (
    Layout,
    LayoutBias,
    layout_attention,
    memory_efficient_attention,
    tile_lists,
)
from dense_attn.optimize import OptimizeResult, optimize_latents, spectral_residual_saliency
from dense_attn.reversible import (
    OffGridError,
    ReversibleSampler,
    ddim_step,
    ddim_step_inverse,
)
from dense_attn.sega import SemanticGuidance, percentile_mask, sega_guidance

__version__ = "0.2.0"
__all__ = [
    "Layout",
    "LayoutBias",
    "OffGridError",
    "OptimizeResult",
    "ReversibleSampler",
    "SemanticGuidance",
    "backends",
    "ddim_step",
    "ddim_step_inverse",
    "layout_attention",
    "memory_efficient_attention",
    "optimize_latents",
    "percentile_mask",
    "sega_guidance",
    "spectral_residual_saliency",
    "tile_lists",
]
