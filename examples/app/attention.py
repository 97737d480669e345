"""How much of a phrase's attention lies inside its region: counted while a layout is on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dense_attn.integrations.diffusers._attention_hook import MARKS, Expected, marked
from dense_attn.integrations.diffusers.state import LayerMark, LayoutState


class Inside:
    """Means over the calls of cross-attention so far: shares [regions], without and with."""

    def __init__(self, regions: int) -> None:
        self.sums = torch.zeros(2, regions, dtype=torch.float64, device="cpu")
        self.calls = 0

    def add(self, plain: Tensor, modulated: Tensor) -> None:
        """Count one call."""
        self.sums += torch.stack([plain, modulated]).double().cpu()
        self.calls += 1

    @property
    def shares(self) -> list[tuple[float, float]] | None:
        """For each region the share without and with the layout; None where nothing was counted."""
        return list(zip(*(self.sums / self.calls).tolist())) if self.calls else None


class Counted:
    """A layout's mark on one layer, which also counts; what the layer computes is the layout's.

    The keys' values are exchanged for ones at a region's tokens and noughts elsewhere, so that
    attention itself sums what each image token gives to the region's phrase. Without the layout
    means the same queries and keys.
    """

    def __init__(self, layout: LayerMark, inside: Inside) -> None:
        self.layout, self.inside = layout, inside

    def expected(self) -> Expected | None:
        """The softmax that the layout exchanges."""
        return self.layout.expected()

    def missed(self, seen: list[tuple[int, int]]) -> None:
        """Tell the layout of a call without its softmax."""
        self.layout.missed(seen)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Any) -> Tensor:
        """The layout's attention of q, k, v [B, H, N, D]."""
        layer = self.layout.state.layers[self.layout.kind, self.layout.depth]
        count = self.inside.sums.shape[1]
        if mask is None and layer.k_order is None and count <= k.shape[-1]:
            bits = torch.arange(count, dtype=torch.int32, device=q.device)
            of_region = ((layer.k_words[:1, :, None] >> bits) & 1).to(k)  # [1, N, R]
            probe = torch.zeros_like(k)
            probe[..., :count] = of_region[:, None]
            where = ((layer.q_words[:1, :, None] >> bits) & 1).float()  # [1, M, R]
            plain = scaled_dot_product_attention(q, k, probe, scale=scale)
            ours = self.layout.attend(q, k, probe, scale, mask)
            self.inside.add(*(_share(out[..., :count], where) for out in (plain, ours)))
        return self.layout.attend(q, k, v, scale, mask)


def _share(given: Tensor, where: Tensor) -> Tensor:
    """The part of what image tokens give [B, H, M, R] that is given inside [1, M, R]: [R]."""
    total = given.float().mean((0, 1))  # [M, R]
    return (total * where[0]).sum(0) / total.sum(0).clamp(min=torch.finfo(torch.float32).tiny)


@contextmanager
def counted(pipe: Any, regions: int) -> Iterator[Inside]:
    """Inside of an `apply_layout` block of regions with phrases: the shares of its calls."""
    inside, parts = (
        Inside(regions),
        (getattr(pipe, "unet", None), getattr(pipe, "transformer", None)),
    )
    layers = [layer for part in parts if part is not None for layer in part.modules()]
    last = [(layer, marks[-1]) for layer in layers if (marks := vars(layer).get(MARKS))]
    marks = [
        (layer, Counted(m, inside))
        for layer, m in last
        if type(getattr(m, "state", None)) is LayoutState
    ]
    with marked(marks):
        yield inside
