"""Strength 0 is plain attention: result and time beside torch's scaled_dot_product_attention."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn import Layout, layout_attention


def seconds(call: Callable[[], Tensor]) -> float:
    """Best of three runs."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def main(grid: int = 32) -> float:
    """Print both times; the largest difference at strength 0."""
    boxes = [(0.1, 0.1, 0.6, 0.9), (0.5, 0.3, 1.0, 1.0)]  # they overlap
    layout = Layout.from_boxes(boxes, size=(64, 64))
    words, order = layout.query_regions(grid, grid), layout.order(grid, grid)
    q, k, v = torch.randn(3, 2, 8, grid * grid, 80).unbind(0)

    def modulated(strength: float) -> Tensor:
        return layout_attention(q, k, v, words, words, strength, q_order=order, k_order=order)

    plain = seconds(lambda: scaled_dot_product_attention(q, k, v))
    ours = seconds(lambda: modulated(0.3))
    difference = (modulated(0.0) - scaled_dot_product_attention(q, k, v)).abs().max().item()
    print(f"plain attention {1e3 * plain:.1f} ms, with the layout {1e3 * ours:.1f} ms")
    print(f"largest difference at strength 0: {difference:.1e}")
    return difference


if __name__ == "__main__":
    main()
