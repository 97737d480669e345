"""Layout-modulated softmax attention, and layouts as the tensors that it takes."""

from dense_attn.layout_attention.layout import Layout
from dense_attn.layout_attention.memory_efficient import LayoutBias, memory_efficient_attention
from dense_attn.layout_attention.op import layout_attention, tile_lists

__all__ = ["Layout", "LayoutBias", "layout_attention", "memory_efficient_attention", "tile_lists"]
