"""Ten lines: keep two halves of an image apart, in self-attention and towards their phrases."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_attn import Layout, layout_attention


def main(grid: int = 64) -> tuple[Tensor, Tensor]:
    """Self- and cross-attention of one layer of grid x grid tokens under a layout of two boxes."""
    boxes = [(0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)]  # x0, y0, x1, y1 as fractions of the image
    phrases = [(2, 4), (6, 8)]  # the tokens of each box's phrase
    layout = Layout.from_boxes(boxes, size=(64, 64), spans=phrases)
    image, text = layout.query_regions(grid, grid), layout.token_regions(77)
    order = layout.order(grid, grid)  # speed only

    q, k, v = torch.randn(3, 2, 8, grid * grid, 40).unbind(0)  # [B, H, tokens, D]
    strength = layout.strength(grid, grid, weight=0.3, time=0.981)
    self_attended = layout_attention(q, k, v, image, image, strength, q_order=order, k_order=order)

    k, v = torch.randn(2, 2, 8, 77, 40).unbind(0)
    strength = layout.strength(grid, grid, weight=1.0, time=0.981)
    cross_attended = layout_attention(q, k, v, image, text, strength, q_order=order)
    return self_attended, cross_attended


if __name__ == "__main__":
    for out in main():
        print(tuple(out.shape), f"mean {out.mean():.4f}")
