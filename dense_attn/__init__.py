"""Fused kernels for controlling pre-trained diffusion models without training."""

from dense_attn._backends import backends
from dense_attn.layout import Layout
from dense_attn.layout_attention import layout_attention

__version__ = "0.1.0"
__all__ = ["Layout", "backends", "layout_attention"]
