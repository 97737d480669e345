"""Layout-modulated softmax attention, and layouts as the tensors that it takes."""

from dense_attn.layout_attention.layout import Layout
from dense_attn.layout_attention.op import layout_attention, tile_lists

__all__ = ["Layout", "layout_attention", "tile_lists"]
