"""Stable Diffusion 1, 2 and XL: a U-Net's self- and cross-attention at several resolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..hooks import unwrapped
from ..state import LayoutState, NearestLayout, Side, order_of
from .call import Call, Entry, Model
from .processor import LayoutProcessor, heads, output, project

if TYPE_CHECKING:
    from dense_attn import Layout

    from ..state import Layer


class UNetProcessor(LayoutProcessor):
    """For the self- and cross-attention of a U-Net."""

    def layer(self, x: Tensor, context: Tensor | None) -> Layer | None:
        """The layer of its resolution, and of its kind."""
        return self.state.layer(self, "self" if context is None else "cross", x, x.shape[1])

    def modulated(
        self, attn: Any, layer: Layer, x: Tensor, context: Tensor | None, **_: Any
    ) -> Tensor:
        """The layer's output [B, M, C]."""
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = heads(attn, project(attn, x, context), attn.norm_q, attn.norm_k)
        out = output(attn, self.state.attend(layer, q, k, v))
        if attn.residual_connection:
            out = out + x
        factor = attn.rescale_output_factor
        return out if factor == 1 else out / factor


@dataclass(frozen=True)
class UNet(Model):
    """UNet2DConditionModel."""

    deepest: int = 0  # halvings of the grid in the middle
    denoiser = "UNet2DConditionModel"
    component = "unet"
    latents = "sample"
    processor = UNetProcessor
    replaces = (
        "AttnProcessor2_0",
        "AttnProcessor",
        "FusedAttnProcessor2_0",
        "SlicedAttnProcessor",
        "XFormersAttnProcessor",
    )

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> UNet:
        """The record of one U-Net."""
        return cls(_resized(denoiser.down_blocks, "downsamplers"))

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """Each halving of the latents has layers of both kinds.

        The finest with attention has tokens of all regions.
        """
        options, (height, width) = state.options, self.grid(call)
        for depth in range(self.deepest + 1):
            if depth == _first_attention(state.pipe.unet) + 1:
                layouts = [NearestLayout(layout.masks) for layout in layouts]
            image = state.image_side(layouts, (height, width), options.self_weight)
            order = order_of(image)
            if options.self_weight:
                yield Entry("self", depth, image, image, order)
            if options.cross_weight:
                cross = state.image_side(layouts, (height, width), options.cross_weight)
                yield Entry("cross", depth, cross, text, order)
            height, width = (height + 1) // 2, (width + 1) // 2

    def depth(self, denoiser: torch.nn.Module, name: str) -> int:
        """How often the grid is halved where a layer is; -1 for GLIGEN's, which have no grid."""
        part, *rest = name.split(".")
        if "fuser" in rest or part not in ("down_blocks", "mid_block", "up_blocks"):
            return -1
        if part == "down_blocks":
            return _resized(denoiser.down_blocks[: int(rest[0])], "downsamplers")
        if part == "up_blocks":
            return self.deepest - _resized(denoiser.up_blocks[: int(rest[0])], "upsamplers")
        return self.deepest


def _first_attention(unet: torch.nn.Module) -> int:
    """How often a U-Net halves its latents before its first attention layers."""
    kinds = unwrapped(unet).config.down_block_types
    return next((level for level, kind in enumerate(kinds) if "Attn" in kind), len(kinds) - 1)


def _resized(blocks: Any, samplers: str) -> int:
    """How many blocks halve the grid, or double it."""
    return sum(bool(getattr(block, samplers, None)) for block in blocks)
