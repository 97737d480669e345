"""Regions of an image and of the prompt that describes them, as layout attention takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.layout_attention._layout_checks import (
    MAX_REGIONS,
    Span,
    as_tensor,
    check_box,
    check_masks,
    check_spans,
    integer,
)

_BITS = (*(1 << r for r in range(MAX_REGIONS - 1)), -(1 << (MAX_REGIONS - 1)))  # bit 31 is the sign
Box = tuple[float, float, float, float]


class Layout:
    """Regions of an image and, for each, the prompt tokens that describe it.

    With m_r the mask of region r resized to (height, width) by the nearest rule of
    `torch.nn.functional.interpolate` from the masks' own grid (a region of which that keeps no
    pixel takes every token whose cell holds a part of it, so that no region is lost), and n =
    height*width, token i of an image (raster order) has

    - the region word `sum_r m_r[i] * 2^r`,
    - the area `S[i] = sum_r m_r[i] * sum(m_r)/n`, 0 in no region,
    - the strength `c[i] = weight * time^exponent * (1 - size_weight*S[i])`.

    Args:
        masks: bool tensor or numpy array `[R, H, W]`, 1 to 32 regions of at least one pixel each;
            they may overlap. A copy is kept, on the masks' device, where the tensors below are made
            (`Layout.to` moves it).
        spans: for each region the tokens (start, stop) of its phrase in the prompt, or None for a
            region without a phrase; None for no phrases at all (self-attention alone). Where spans
            overlap the later region wins.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Source: Kim et al., Dense Text-to-Image Generation with Attention Modulation, ICCV 2023.

    Example:
        >>> import torch
        >>> from dense_attn import Layout
        >>> left = [(0.0, 0.0, 0.5, 1.0)]
        >>> layout = Layout.from_boxes(left, size=(64, 64), spans=[(1, 3)])
        >>> layout.query_regions(2, 2).tolist(), layout.token_regions(4).tolist()
        ([1, 0, 1, 0], [0, 1, 1, 0])
        >>> layout.strength(2, 2, weight=1.0, time=1.0).tolist()
        [0.5, 1.0, 0.5, 1.0]
    """

    def __init__(
        self, masks: Tensor | np.ndarray, spans: Sequence[Span | None] | None = None
    ) -> None:
        self.masks = check_masks(as_tensor("masks", masks))  # bool [R, H, W]
        self.spans = None if spans is None else check_spans(spans, len(self.masks))

    @classmethod
    def from_label_map(
        cls,
        label_map: Tensor | np.ndarray,
        spans: Sequence[Span | None] | None = None,
        *,
        background: bool = False,
    ) -> Layout:
        """The layout of an integer label map `[H, W]`: one region per distinct label, in ascending
        order.

        Label 0 is the background: pixels of no region, unless `background=True` makes it the first
        region (DenseDiffusion's choice for a prompt with a phrase for the background).

        Example:
            >>> import torch
            >>> labels = torch.tensor([[0, 7], [2, 7]])
            >>> Layout.from_label_map(labels).query_regions(2, 2).tolist()  # 2 is bit 0, 7 is bit 1
            [0, 2, 1, 2]
            >>> Layout.from_label_map(labels, background=True).query_regions(2, 2).tolist()
            [1, 4, 2, 4]
        """
        labels = as_tensor("label_map", label_map)
        if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
            _checks.refuse(
                "label_map", "be of an integer dtype", _checks.name(labels.dtype), TypeError
            )
        if labels.dim() != 2:
            _checks.refuse("label_map", "have 2 dimensions [height, width]", tuple(labels.shape))
        labels = labels.to(torch.int64)
        present = labels.unique()  # ascending
        if len(present) and present[0] < 0:
            _checks.refuse("label_map", "hold labels from 0 up", int(present[0]))
        if not background:
            present = present[present != 0]
        if not 1 <= len(present) <= MAX_REGIONS:
            besides = "" if background else " besides 0, the background"
            rule = f"hold 1 to {MAX_REGIONS} distinct labels{besides}"
            _checks.refuse("label_map", rule, len(present))
        return cls(labels == present[:, None, None], spans)

    @classmethod
    def from_boxes(
        cls, boxes: Sequence[Box], size: tuple[int, int], spans: Sequence[Span | None] | None = None
    ) -> Layout:
        """The layout of boxes (x0, y0, x1, y1), fractions 0..1 of width and height, on a grid of
        size (height, width).

        A pixel belongs to a box when its centre lies in it; each box must hold at least one centre.

        Example:
            >>> layout = Layout.from_boxes([(0.5, 0.0, 1.0, 0.5)], size=(4, 4))
            >>> layout.query_regions(4, 4).view(4, 4).tolist()
            [[0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
        """
        if not isinstance(size, Sequence) or len(size) != 2:
            _checks.refuse("size", "be a pair (height, width)", size)
        height, width = (integer(f"size[{axis}]", extent, 1) for axis, extent in enumerate(size))
        if not isinstance(boxes, Sequence):
            _checks.refuse(
                "boxes", "be a list of (x0, y0, x1, y1)", type(boxes).__name__, TypeError
            )
        if not 1 <= len(boxes) <= MAX_REGIONS:
            _checks.refuse("boxes", f"hold 1 to {MAX_REGIONS} boxes", len(boxes))
        for r, box in enumerate(boxes):
            check_box(f"boxes[{r}]", box)
        corners = torch.tensor(boxes, dtype=torch.float64, device="cpu")  # [R, 4]
        x0, y0, x1, y1 = corners.reshape(-1, 4, 1).unbind(1)  # [R, 1] each
        x = (torch.arange(width, dtype=torch.float64, device="cpu") + 0.5) / width
        y = (torch.arange(height, dtype=torch.float64, device="cpu") + 0.5) / height
        inside_x, inside_y = (x0 <= x) & (x < x1), (y0 <= y) & (y < y1)  # [R, W], [R, H]
        empty = ~(inside_x.any(1) & inside_y.any(1))
        if empty.any():
            r = int(empty.nonzero()[0])
            _checks.refuse(
                f"boxes[{r}]",
                f"hold the centre of a pixel of the {height} x {width} grid",
                boxes[r],
            )
        return cls(inside_y[:, :, None] & inside_x[:, None, :], spans)

    def __len__(self) -> int:
        return len(self.masks)

    def __repr__(self) -> str:
        height, width = self.masks.shape[1:]
        return f"Layout({len(self)} regions, {height} x {width}, spans={self.spans})"

    def to(self, device: torch.device | str) -> Layout:
        """A layout of these masks on another device, and so everything made from them."""
        return Layout(self.masks.to(device), self.spans)

    def query_regions(self, height: int, width: int) -> Tensor:
        """Words of a height x width grid of image tokens in their order, int32 `[height*width]`."""
        masks = self._resized(height, width)  # [R, height*width]
        bits = torch.tensor(_BITS[: len(self)], dtype=torch.int32, device=masks.device)
        return (masks * bits[:, None]).sum(0, dtype=torch.int32)

    def token_regions(self, num_tokens: int) -> Tensor:
        """Words of a prompt's num_tokens tokens, int32 `[num_tokens]`; 0 where no phrase is."""
        num_tokens = integer("num_tokens", num_tokens, 1)
        if self.spans is None:
            _checks.refuse("spans", "be given to the Layout for its token words", None)
        words = torch.zeros(num_tokens, dtype=torch.int32, device="cpu")
        for r, span in enumerate(self.spans):
            if span is None:
                continue
            if span[1] > num_tokens:
                _checks.refuse(
                    "num_tokens", f"be at least {span[1]}, the stop of spans[{r}]", num_tokens
                )
            words[span[0] : span[1]] = _BITS[r]
        return words.to(self.masks.device)

    def order(self, height: int, width: int) -> Tensor:
        """Permutation of the image tokens, int32 `[height*width]`, in which tokens of one region
        word stand together.

        Raster order within a word. For `layout_attention(q_order=, k_order=)`: speed only, never
        the result.
        """
        return self.query_regions(height, width).argsort(stable=True).to(torch.int32)

    def area(self, height: int, width: int) -> Tensor:
        """Shares of the image that a token's regions cover together, float32 `[height*width]`."""
        masks = self._resized(height, width)  # [R, height*width]
        share = masks.sum(1, keepdim=True).float() / masks.shape[1]  # [R, 1]
        return (masks * share).sum(0)

    def strength(
        self,
        height: int,
        width: int,
        *,
        weight: float,
        time: float,
        exponent: float = 5,
        size_weight: float = 1.0,
    ) -> Tensor:
        """Strengths of the image tokens, `weight * time**exponent * (1 - size_weight*area)`,
        float32 `[height*width]`.

        Args:
            height, width: the grid of image tokens.
            weight: DenseDiffusion takes 1.0 for cross-attention and 0.3 for self-attention.
            time: 1 at pure noise, 0 at the image: t/1000 of the scheduler's timestep, or sigma of a
                flow model.
            exponent: how fast the strength falls as the image appears, at least 0.
            size_weight: how much less a large region needs; 0 gives every region the same strength.

        Example:
            >>> layout = Layout.from_boxes([(0.0, 0.0, 0.5, 1.0)], size=(64, 64))
            >>> layout.strength(1, 2, weight=1.0, time=0.5, exponent=1).tolist()
            [0.25, 0.5]
        """
        for argument, value in (
            ("weight", weight),
            ("time", time),
            ("exponent", exponent),
            ("size_weight", size_weight),
        ):
            _checks.number(argument, value)
        if not 0 <= time <= 1:
            _checks.refuse("time", "be in 0..1 (the timestep divided by 1000)", time)
        if exponent < 0:
            _checks.refuse("exponent", "be at least 0", exponent)
        return weight * time**exponent * (1 - size_weight * self.area(height, width))

    def _resized(self, height: int, width: int) -> Tensor:
        """The masks at another resolution, bool [R, height*width]."""
        size = (integer("height", height, 1), integer("width", width, 1))
        return resized(self.masks, size).flatten(1)


def nearest(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [R, H, W] on the grid of a size by nearest pixels, bool [R, height, width]; small
    regions may be lost.
    """
    batch = masks[None].to(torch.uint8)
    return torch.nn.functional.interpolate(batch, size, mode="nearest")[0].bool()


def resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [R, H, W] on the grid of a size, bool [R, height, width]; a region of at least one
    pixel keeps one.

    Nearest pixels; a region that has none of them takes every cell of the grid that holds a part of
    it.
    """
    sampled = nearest(masks, size)
    cells = torch.nn.functional.adaptive_max_pool2d(masks.to(torch.float32), size).bool()
    # No branch on it: that would wait for a GPU and break a compiled graph.
    kept = sampled.flatten(1).any(1)
    return torch.where(kept[:, None, None], sampled, cells)
