"""Stable Diffusion 3: joint attention, image tokens first, and the image's own in some blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..state import LayoutState, Side, joined, order_of
from .call import Call, Entry, Model
from .processor import LayoutProcessor, Result, heads, output, project, project_text

if TYPE_CHECKING:
    from dense_attn import Layout

    from ..state import Layer


class SD3Processor(LayoutProcessor):
    """For the blocks of Stable Diffusion 3: image tokens, then text tokens."""

    def layer(self, x: Tensor, context: Tensor | None) -> Layer | None:
        """The one of its kind."""
        if context is None:
            return self.state.layer(self, "self", x, x.shape[1])
        return self.state.layer(self, "joint", x, x.shape[1] + context.shape[1])

    def modulated(
        self, attn: Any, layer: Layer, x: Tensor, context: Tensor | None, **_: Any
    ) -> Result:
        """The image's output; in joint attention also the text's."""
        tokens = heads(attn, project(attn, x), attn.norm_q, attn.norm_k)
        if context is not None:
            projected = project_text(attn, context)
            text = heads(attn, projected, attn.norm_added_q, attn.norm_added_k)
            tokens = [torch.cat(pair, 1) for pair in zip(tokens, text)]
        out = self.state.attend(layer, *tokens)
        if context is None:
            return output(attn, out)
        image, rest = out[:, : x.shape[1]], out[:, x.shape[1] :]
        return output(attn, image), rest if attn.context_pre_only else attn.to_add_out(rest)


@dataclass(frozen=True)
class SD3(Model):
    """SD3Transformer2DModel."""

    patch: int
    denoiser = "SD3Transformer2DModel"
    processor = SD3Processor
    # diffusers' fused one leaves out the norms
    replaces = ("JointAttnProcessor2_0", "XFormersJointAttnProcessor")

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> SD3:
        """The record of one transformer."""
        return cls(denoiser.config.patch_size)

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """One entry of each kind."""
        height, width = (side // self.patch for side in self.grid(call))
        image = state.image_side(layouts, (height, width), state.options.self_weight)
        tokens = joined(image, text)
        yield Entry("joint", 0, tokens, tokens, order_of(tokens))
        if state.options.self_weight:
            yield Entry("self", 0, image, image, order_of(image))
