"""Stable Diffusion 1, 2 and XL: a U-Net's self- and cross-attention at several resolutions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..hooks import unwrapped
from ..layers import Side
from ..state import LayoutState, NearestLayout
from .record import Call, Entry, Model

if TYPE_CHECKING:
    from dense_attn import Layout


@dataclass(frozen=True)
class UNet(Model):
    """UNet2DConditionModel."""

    deepest: int = 0  # halvings of the grid in the middle
    upcasts: bool = False  # pipelines of XL's U-Net do
    denoiser = "UNet2DConditionModel"
    component = "unet"
    latents = "sample"

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> UNet:
        """The record of one U-Net."""
        xl = denoiser.config.addition_embed_type == "text_time"
        return cls(deepest=_resized(denoiser.down_blocks, "downsamplers"), upcasts=xl)

    @property
    def layer_kinds(self) -> list[tuple[set[str], set[str]]]:
        """Self- and cross-attention, from the image alone."""
        return [({"image"}, {"image"}), ({"image"}, {"text"})]

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """Each halving of the latents has layers of both kinds.

        The finest with attention has tokens of all regions.
        """
        height, width = self.grid(call)
        for depth in range(self.deepest + 1):
            if depth == _first_attention(state.pipe.unet) + 1:
                layouts = [NearestLayout(layout.masks) for layout in layouts]
            for kind, column in (("self", "image"), ("cross", "text")):
                if weight := state.options.weight("image", (column,)):
                    image = state.image_side(layouts, (height, width), weight)
                    yield Entry(kind, depth, image, text if kind == "cross" else image)
            height, width = (height + 1) // 2, (width + 1) // 2

    def place(self, denoiser: torch.nn.Module, name: str) -> tuple[str, int] | None:
        """A layer's kind and its halvings of the grid; None for GLIGEN's, which have no grid."""
        part, *rest = name.split(".")
        if "fuser" in rest or part not in ("down_blocks", "mid_block", "up_blocks"):
            return None
        depth = self.deepest
        if part == "down_blocks":
            depth = _resized(denoiser.down_blocks[: int(rest[0])], "downsamplers")
        if part == "up_blocks":
            depth -= _resized(denoiser.up_blocks[: int(rest[0])], "upsamplers")
        cross = denoiser.get_submodule(name).is_cross_attention
        return "cross" if cross else "self", depth


def _first_attention(unet: torch.nn.Module) -> int:
    """How often a U-Net halves its latents before its first attention layers."""
    kinds = unwrapped(unet).config.down_block_types
    return next((level for level, kind in enumerate(kinds) if "Attn" in kind), len(kinds) - 1)


def _resized(blocks: Any, samplers: str) -> int:
    """How many blocks halve the grid, or double it."""
    return sum(bool(getattr(block, samplers, None)) for block in blocks)
