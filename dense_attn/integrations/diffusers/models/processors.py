"""Attention processors: the one that was there, but for the rows of the batch and the steps that a
layout modulates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .._state import Layer, LayoutState

Result = Tensor | tuple[Tensor, ...]


class LayoutProcessor:
    """What families share: the processor that was there, for calls without a layout."""

    def __init__(self, original: Any, state: LayoutState, depth: int = 0) -> None:
        self.original, self.state = original, state
        self.depth = depth  # how often the grid of latents is halved where its layer is


class RowsProcessor(LayoutProcessor):
    """Rows of the batch without a layout go to the processor that was there, in calls of their
    own.
    """

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: Tensor,  # [B, M, C]
        encoder_hidden_states: Tensor | None = None,  # [B, N, C]
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Result:
        """The layer's output [B, M, C]; of joint attention also that of the text tokens [B, N,
        C].
        """
        layer = self._layer(hidden_states, encoder_hidden_states)
        if layer is None:
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, **kwargs
            )
        _refuse_mask(attention_mask)
        parts, (first, last) = [], (self.state.first, self.state.last)
        for rows in (slice(0, first), slice(first, last), slice(last, hidden_states.shape[0])):
            if rows.start == rows.stop:
                continue
            x, context = (
                None if y is None else y[rows] for y in (hidden_states, encoder_hidden_states)
            )
            if rows.start == first:
                parts.append(self._modulated(attn, layer, x, context))
            else:
                parts.append(self.original(attn, x, context, None, **kwargs))
        if isinstance(parts[0], tuple):
            return tuple(torch.cat(tensors) for tensors in zip(*parts))
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class UNetProcessor(RowsProcessor):
    """For the self- and cross-attention of a U-Net."""

    def _layer(self, x: Tensor, context: Tensor | None) -> Layer | None:
        return self.state.layer(self, "self" if context is None else "cross", x, x.shape[1])

    def _modulated(self, attn: Any, layer: Layer, x: Tensor, context: Tensor | None) -> Tensor:
        if context is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        q, k, v = _project(attn, x, context)
        q, k, v = (_heads(tokens, attn.heads) for tokens in (q, k, v))
        out = _whole(self.state.attend(layer, _normed(attn.norm_q, q), _normed(attn.norm_k, k), v))
        out = attn.to_out[1](attn.to_out[0](out))
        return (out + x if attn.residual_connection else out) / attn.rescale_output_factor


class JointProcessor(RowsProcessor):
    """For the blocks of Stable Diffusion 3: image tokens, then text tokens."""

    def _layer(self, x: Tensor, text: Tensor | None) -> Layer | None:
        if text is None:
            return self.state.layer(self, "self", x, x.shape[1])
        return self.state.layer(self, "joint", x, x.shape[1] + text.shape[1])

    def _modulated(self, attn: Any, layer: Layer, x: Tensor, text: Tensor | None) -> Result:
        q, k, v = (_heads(tokens, attn.heads) for tokens in _project(attn, x, None))
        q, k = _normed(attn.norm_q, q), _normed(attn.norm_k, k)
        if text is not None:
            text_q, text_k, text_v = (
                _heads(tokens, attn.heads) for tokens in _project_text(attn, text)
            )
            text_q, text_k = _normed(attn.norm_added_q, text_q), _normed(attn.norm_added_k, text_k)
            q, k, v = (torch.cat(pair, 2) for pair in ((q, text_q), (k, text_k), (v, text_v)))
        out = _whole(self.state.attend(layer, q, k, v))
        image = attn.to_out[1](attn.to_out[0](out[:, : x.shape[1]]))
        if text is None:
            return image
        rest = out[:, x.shape[1] :]
        return image, rest if attn.context_pre_only else attn.to_add_out(rest)


class FluxProcessor(LayoutProcessor):
    """For FLUX: text tokens, then image tokens, all of them in hidden_states in its single
    blocks.
    """

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
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Result:
        """The image's output, with text tokens of their own also theirs."""
        text = encoder_hidden_states
        tokens = hidden_states.shape[1] + (0 if text is None else text.shape[1])
        layer = self.state.layer(self, "joint", hidden_states, tokens)
        if layer is None:
            return self.original(
                attn, hidden_states, text, attention_mask, image_rotary_emb, **kwargs
            )
        _refuse_mask(attention_mask)
        return self._modulated(attn, layer, hidden_states, text, image_rotary_emb)

    def _modulated(
        self,
        attn: Any,
        layer: Layer,
        x: Tensor,
        text: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
    ) -> Result:
        from diffusers.models.embeddings import apply_rotary_emb

        q, k, v = (
            tokens.unflatten(-1, (attn.heads, -1)) for tokens in _project(attn, x, None)
        )  # [B, M, H, D]
        q, k = attn.norm_q(q), attn.norm_k(k)
        if text is not None:
            text_q, text_k, text_v = (
                tokens.unflatten(-1, (attn.heads, -1)) for tokens in _project_text(attn, text)
            )
            text_q, text_k = attn.norm_added_q(text_q), attn.norm_added_k(text_k)
            q, k, v = (torch.cat(pair, 1) for pair in ((text_q, q), (text_k, k), (text_v, v)))
        if rotary is not None:
            q, k = (apply_rotary_emb(tokens, rotary, sequence_dim=1) for tokens in (q, k))
        out = _whole(self.state.attend(layer, *(tokens.transpose(1, 2) for tokens in (q, k, v))))
        if text is None:
            return out
        text_out, image_out = out.split((text.shape[1], x.shape[1]), 1)
        return attn.to_out[1](attn.to_out[0](image_out.contiguous())), attn.to_add_out(
            text_out.contiguous()
        )


def _project(attn: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """q, k and v, from fused weights where the pipeline has fused them."""
    if not getattr(attn, "fused_projections", False):
        keys = x if context is None else context
        return attn.to_q(x), attn.to_k(keys), attn.to_v(keys)
    if context is None:
        return attn.to_qkv(x).chunk(3, -1)
    return attn.to_q(x), *attn.to_kv(context).chunk(2, -1)


def _project_text(attn: Any, text: Tensor) -> tuple[Tensor, ...]:
    """The same of text tokens with weights of their own."""
    if getattr(attn, "fused_projections", False):
        return attn.to_added_qkv(text).chunk(3, -1)
    return attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)


def _heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, H*D] as [B, H, N, D], a view."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def _whole(out: Tensor) -> Tensor:
    """[B, H, N, D] as [B, N, H*D]."""
    return out.transpose(1, 2).flatten(2)


def _normed(norm: torch.nn.Module | None, tokens: Tensor) -> Tensor:
    return tokens if norm is None else norm(tokens)


def _refuse_mask(mask: Tensor | None) -> None:
    if mask is not None:
        raise ValueError("attention_mask must be None while a layout is on, got a mask")
