"""FLUX: joint attention, text tokens first; a negative prompt's estimate is a call of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

from ..state import LayoutState, Side, joined, order_of
from .call import Call, Entry, Model
from .processor import LayoutProcessor, Result, heads, output, project, project_text

if TYPE_CHECKING:
    from dense_attn import Layout

    from ..state import Layer


class FluxProcessor(LayoutProcessor):
    """For FLUX: text tokens, then image tokens; in single blocks hidden_states holds both."""

    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend  # set_attention_backend inside of the block

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,  # [B, M, C]
        encoder_hidden_states: Tensor | None = None,  # [B, N, C]
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,  # diffusers looks for this name
        **kwargs: Any,
    ) -> Result:
        """The image's output, with text tokens of their own also the text's."""
        kwargs["image_rotary_emb"] = image_rotary_emb
        return super().__call__(
            attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs
        )

    def layer(self, x: Tensor, context: Tensor | None) -> Layer | None:
        """The only one."""
        tokens = x.shape[1] + (0 if context is None else context.shape[1])
        return self.state.layer(self, "joint", x, tokens)

    def modulated(
        self,
        attn: Any,
        layer: Layer,
        x: Tensor,
        context: Tensor | None,
        *,
        image_rotary_emb: tuple[Tensor, Tensor] | None,
        **_: Any,
    ) -> Result:
        """The image's output, with text tokens of their own also the text's."""
        from diffusers.models.embeddings import apply_rotary_emb

        q, k, v = heads(attn, project(attn, x), attn.norm_q, attn.norm_k)
        if context is not None:
            projected = project_text(attn, context)
            text = heads(attn, projected, attn.norm_added_q, attn.norm_added_k)
            q, k, v = (torch.cat(pair, 1) for pair in zip(text, (q, k, v)))
        if image_rotary_emb is not None:
            q, k = (apply_rotary_emb(y, image_rotary_emb, sequence_dim=1) for y in (q, k))
        out = self.state.attend(layer, q, k, v)
        if context is None:
            return out
        rest, image = out.split((context.shape[1], x.shape[1]), 1)
        return output(attn, image.contiguous()), attn.to_add_out(rest.contiguous())


@dataclass(frozen=True)
class Flux(Model):
    """FluxTransformer2DModel."""

    denoiser = "FluxTransformer2DModel"
    unit = 1e-3
    guidance_apart = True
    processor = FluxProcessor
    replaces = ("FluxAttnProcessor",)

    @classmethod
    def of(cls, denoiser: torch.nn.Module) -> Flux:
        """The record of any of them."""
        return cls()

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width, of which a token packs 2 x 2.

        Rows and columns are counted, for bfloat16 rounds places past 256.
        """
        places = call.places
        if places.dim() == 3:
            places = places[0]  # as the transformer reads them
        own = places[places[:, 0] == 0]
        width = int((own[:, 1] == 0).sum())
        height = len(own) // max(width, 1)
        rows = torch.arange(height, dtype=torch.int64, device=own.device).repeat_interleave(width)
        if len(own) != height * width or not torch.equal(own[:, 1], rows.to(own.dtype)):
            rule = "number its image tokens row by row (img_ids)"
            _checks.refuse("pipe", rule, f"{len(own)} in rows of {width}")
        return 2 * height, 2 * width

    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """One kind; the tokens of an image to edit come last and belong to no region."""
        height, width = (side // 2 for side in self.grid(call))
        others = call.latents.shape[1] - height * width
        image = state.image_side(layouts, (height, width), state.options.self_weight, others)
        tokens = joined(text, image)
        yield Entry("joint", 0, tokens, tokens, order_of(tokens))
