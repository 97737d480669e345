"""Attention processors: the one that was there, but for the steps in which a layout acts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import _checks

if TYPE_CHECKING:
    from ..state import Layer, LayoutState

Result = Tensor | tuple[Tensor, ...]


# diffusers' processors of scaled_dot_product_attention, in whose rows nothing else happens
PLAIN = ("AttnProcessor2_0", "FusedAttnProcessor2_0", "JointAttnProcessor2_0")


class LayoutProcessor:
    """The part that models share: without a layout, the processor that was there goes on."""

    def __init__(self, original: Any, state: LayoutState, depth: int = 0) -> None:
        self.original, self.state = original, state
        self.depth = depth  # how often the grid of latents is halved where its layer is
        self._plain = type(original).__name__ in PLAIN

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,  # [B, M, C]
        encoder_hidden_states: Tensor | None = None,  # [B, N, C]
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Result:
        """The layer's output [B, M, C]; of joint attention also that of the text [B, N, C]."""
        x, context = hidden_states, encoder_hidden_states
        layer = self.layer(x, context)
        if layer is None:
            return self.original(attn, x, context, attention_mask, **kwargs)
        if attention_mask is not None:
            _checks.refuse("attention_mask", "be None while a layout is on", "a mask")
        if self._plain or self.state.last - self.state.first == len(x):
            return self.modulated(attn, layer, x, context, **kwargs)
        return self._apart(attn, layer, x, context, **kwargs)

    def _apart(
        self, attn: Any, layer: Layer, x: Tensor, context: Tensor | None, **kwargs: Any
    ) -> Result:
        """Rows with and without a layout in calls of their own."""
        parts: list[Any] = []
        first, last = self.state.first, self.state.last
        for rows in (slice(0, first), slice(first, last), slice(last, len(x))):
            if rows.start < rows.stop:
                some = x[rows], None if context is None else context[rows]
                if rows.start == first:
                    parts.append(self.modulated(attn, layer, *some, **kwargs))
                else:
                    parts.append(self.original(attn, *some, None, **kwargs))
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(tensors) for tensors in zip(*parts))
        return torch.cat(parts)

    def layer(self, x: Tensor, context: Tensor | None) -> Layer | None:
        """The layout's layer that these tokens belong to, None where nothing is modulated."""
        raise NotImplementedError

    def modulated(
        self, attn: Any, layer: Layer, x: Tensor, context: Tensor | None, **kwargs: Any
    ) -> Result:
        """The output of a layer under its layout."""
        raise NotImplementedError


def project(attn: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
    """q, k and v, from fused weights where the pipeline has fused them."""
    if not getattr(attn, "fused_projections", False):
        keys = x if context is None else context
        return attn.to_q(x), attn.to_k(keys), attn.to_v(keys)
    if context is None:
        return attn.to_qkv(x).chunk(3, -1)
    return attn.to_q(x), *attn.to_kv(context).chunk(2, -1)


def project_text(attn: Any, text: Tensor) -> tuple[Tensor, ...]:
    """Text tokens' q, k and v, which have weights of their own."""
    if getattr(attn, "fused_projections", False):
        return attn.to_added_qkv(text).chunk(3, -1)
    return attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)


def heads(attn: Any, tokens: tuple[Tensor, ...], q_norm: Any, k_norm: Any) -> list[Tensor]:
    """q, k and v [B, N, H*D] as [B, N, H, D], the first two normed where the model does that."""
    count = attn.heads
    q, k, v = (x.view(x.shape[0], x.shape[1], count, x.shape[2] // count) for x in tokens)
    return [q if q_norm is None else q_norm(q), k if k_norm is None else k_norm(k), v]


def output(attn: Any, tokens: Tensor) -> Tensor:
    """Attention's result through the layer's last projection."""
    linear, dropout = attn.to_out
    return dropout(linear(tokens))
