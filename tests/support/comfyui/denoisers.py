"""Denoisers of a few random weights that attend in ComfyUI's ways, under ComfyUI's class names."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

HEADS, WIDTH, TEXT = 2, 16, 8  # of attention, of a token, of a text's token


def overridable(func: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An attention that goes to `optimized_attention_override` where there is one."""

    @wraps(func)
    def wrapper(*args: Any, **kwargs: Any) -> Tensor:
        if "_inside_attn_wrapper" not in kwargs:
            kwargs["_inside_attn_wrapper"] = True
            override = kwargs["transformer_options"].get("optimized_attention_override")
            if override is not None:
                return override(func, *args, **kwargs)
        return func(*args, **kwargs)

    return wrapper


@overridable
def optimized_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    mask: Tensor | None = None,
    attn_precision: object = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Attention of [B, N, H * D], or of [B, H, N, D] where `skip_reshape`."""
    if not skip_reshape:
        q, k, v = (x.unflatten(-1, (-1, q.shape[-1] // heads)).transpose(1, 2) for x in (q, k, v))
    if mask is not None:
        mask = mask[None] if mask.dim() == 2 else mask
        mask = mask[:, None] if mask.dim() == 3 else mask
    more = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **more)
    return out if skip_output_reshape else out.transpose(1, 2).flatten(2)


class Projections(nn.Module):
    """The q, k and v of one layer."""

    def __init__(self, keys: int = WIDTH, key_heads: int = HEADS) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH, bias=False)
        inner = WIDTH // HEADS * key_heads
        self.k, self.v = nn.Linear(keys, inner, bias=False), nn.Linear(keys, inner, bias=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        context = x if context is None else context
        return 3 * self.q(x), 3 * self.k(context), self.v(context)


class UNetModel(nn.Module):
    """Self- and cross-attention on two grids, which `activations_shape` says."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.lift = nn.Linear(channels, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleList([Projections(), Projections(TEXT)]) for _ in range(2)
        )
        self.back = nn.Linear(WIDTH, channels)

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict, **_: Any) -> Tensor:
        x = self.lift(x.movedim(1, -1)).movedim(-1, 1)
        for depth, layer in enumerate(self.layers):
            small = x if depth == 0 else functional.avg_pool2d(x, 2, ceil_mode=True)
            transformer_options["activations_shape"] = list(small.shape)
            tokens = small.flatten(2).transpose(1, 2)
            for kind, text in zip(layer, (None, context)):
                how = {"attn_precision": None, "transformer_options": transformer_options}
                tokens = tokens + optimized_attention(*kind(tokens, text), HEADS, **how)
            small = tokens.transpose(1, 2).view_as(small)
            x = x + functional.interpolate(small, x.shape[-2:], mode="nearest")
        return self.back(x.movedim(1, -1)).movedim(-1, 1)


class WanModel(nn.Module):
    """Self- and cross-attention of a video's tokens of 1 x 2 x 2 latents."""

    patch_size = (1, 2, 2)

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.lift = nn.Conv3d(channels, WIDTH, self.patch_size, self.patch_size)
        self.own, self.crossed = Projections(), Projections(TEXT)
        self.back = nn.ConvTranspose3d(WIDTH, channels, self.patch_size, self.patch_size)

    def forward(self, x: Tensor, context: Tensor, transformer_options: dict, **_: Any) -> Tensor:
        patches = self.lift(x)
        tokens = patches.flatten(2).transpose(1, 2)
        for layer, text in ((self.own, None), (self.crossed, context)):
            q, k, v = layer(tokens, text)
            attended = optimized_attention(
                q, k, v, heads=HEADS, transformer_options=transformer_options
            )
            tokens = tokens + attended
        return self.back(tokens.transpose(1, 2).view_as(patches))


class Flux(nn.Module):
    """Joint attention of the text and the image, with masks, scales and split heads."""

    patch_size = 2
    key_heads = HEADS
    own_layer = False  # whether the image has a layer of its own, as in Stable Diffusion 3.5

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.lift = nn.Conv2d(channels, WIDTH, 2, 2)
        self.text = nn.Linear(TEXT, WIDTH)
        self.layers = nn.ModuleList(Projections(key_heads=self.key_heads) for _ in range(2))
        self.back = nn.ConvTranspose2d(WIDTH, channels, 2, 2)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        transformer_options: dict,
        attention_mask: Tensor | None = None,
        ref_latents: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        options = dict(transformer_options)
        padded = functional.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")
        patches = self.lift(padded)
        image = patches.flatten(2).transpose(1, 2)
        count, text = image.shape[1], context.shape[1]
        if ref_latents is not None:
            image = torch.cat([image, self.lift(ref_latents).flatten(2).transpose(1, 2)], 1)
        tokens, mask = torch.cat([self.text(context), image], 1), None
        if attention_mask is not None:
            there = attention_mask.new_ones(len(x), image.shape[1])
            mask = torch.cat([attention_mask, there], 1)[:, None, None]
        for layer in self.layers:
            q, k, v = (y.unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for y in layer(tokens))
            how = {"skip_reshape": True, "transformer_options": options, "scale": 0.3}
            grouped = {"enable_gqa": True} if self.key_heads < HEADS else {}
            tokens = tokens + optimized_attention(q, k, v, HEADS, mask=mask, **how, **grouped)
            if self.own_layer:
                own = layer(tokens[:, text:])
                more = optimized_attention(*own, HEADS, transformer_options=options)
                tokens = torch.cat([tokens[:, :text], tokens[:, text:] + more], 1)
        out = tokens[:, text : text + count].transpose(1, 2).view_as(patches)
        return self.back(out)[..., : x.shape[-2], : x.shape[-1]]


class QwenImageTransformer2DModel(Flux):
    """A model with fewer heads of keys."""

    key_heads = 1


class OpenAISignatureMMDITWrapper(Flux):
    """A model whose image has layers of its own."""

    own_layer = True
