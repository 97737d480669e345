"""Gradients of layout attention: steps on the queries until a token attends where it is told."""

from __future__ import annotations

import torch
from torch import Tensor

from dense_attn import Layout, layout_attention


def main(grid: int = 16, steps: int = 20) -> list[float]:
    """Pull the attention of the left half's tokens to one value of v; the loss of each step."""
    torch.manual_seed(0)
    layout = Layout.from_boxes([(0.0, 0.0, 0.5, 1.0)], size=(grid, grid))
    words = layout.query_regions(grid, grid)
    strength = layout.strength(grid, grid, weight=0.3, time=0.9)
    q, k, v = torch.randn(3, 1, 4, grid * grid, 40).unbind(0)
    target = v[:, :, :1]  # [B, H, 1, D]
    q = q.clone().requires_grad_()
    optimizer = torch.optim.Adam([q], lr=0.1)

    def loss() -> Tensor:
        out = layout_attention(q, k, v, words, words, strength)  # [B, H, M, D]
        return (out - target)[:, :, words != 0].square().mean()

    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


if __name__ == "__main__":
    losses = main()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
