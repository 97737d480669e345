"""A GPU's contenders: the library's ways to be called, SDPA's backends, attention with a bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import dense_attn
from dense_attn import layout_attention

from ..harness.measure import by_backend
from .baselines import (
    Call,
    bias_after_statistics,
    compiled_flex,
    eager,
    extent,
    flex_naive,
    flex_smart,
    sdpa,
    sdpa_bias,
    temperature_and_strength,
)
from .workloads import Inputs

_ALIGN = 8  # elements: the start of a bias's rows and flash attention's head dim are multiples
_BITS = 32


def raster(inputs: Inputs) -> Call:
    """This library, tokens as they come, tile lists made once for the layout."""
    return _ours(inputs, order=False, listed=True)


def by_region(inputs: Inputs) -> Call:
    """This library, visiting the tokens region by region, tile lists made once for the layout."""
    return _ours(inputs, order=None, listed=True)


def no_lists(inputs: Inputs) -> Call:
    """This library, tokens as they come, tile lists made in the call."""
    return _ours(inputs, order=False, listed=False)


def gathered(inputs: Inputs) -> Call:
    """This library on tokens copied by region and back in the call: an order must beat it."""
    by_query, by_key = _order(inputs.q_regions).long(), _order(inputs.k_regions).long()
    back = by_query.argsort()
    strength = inputs.strength[..., by_query]
    words = inputs.q_regions[by_query], inputs.k_regions[by_key]
    orders = {"q_order": False, "k_order": False}
    lists = dense_attn.tile_lists(inputs.q, inputs.k, *words, **orders)
    how = orders | {"modulation": inputs.modulation, "tile_lists": lists}

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q[:, :, by_query], k[:, :, by_key], v[:, :, by_key]
        return layout_attention(q, k, v, *words, strength, **how)[:, :, back]

    return call


def named(inputs: Inputs, backend: str) -> Call:
    """This library by one of its backends, tokens as they come."""
    return _ours(inputs, order=False, listed=True, backend=backend)


def _ours(inputs: Inputs, order: bool | None, listed: bool, backend: str = "auto") -> Call:
    words = inputs.q_regions, inputs.k_regions
    how = {"q_order": order, "k_order": order, "backend": backend}
    lists = dense_attn.tile_lists(inputs.q, inputs.k, *words, **how) if listed else None
    how |= {"modulation": inputs.modulation, "tile_lists": lists}
    return lambda q, k, v: layout_attention(q, k, v, *words, inputs.strength, **how)


def _order(words: Tensor) -> Tensor:
    return words.argsort(stable=True).to(torch.int32)


def pinned(backend: SDPBackend) -> Callable[[Inputs], Call]:
    """Plain SDPA by one of its backends, which runs or raises."""

    def prepare(inputs: Inputs) -> Call:
        plain = sdpa(inputs)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return plain(q, k, v)

        return call

    return prepare


def efficient_bias(inputs: Inputs) -> Call:
    """The memory-efficient kernel with a bias in memory, after a pass for the rows' extremes."""
    biased = bias_after_statistics(inputs, _ALIGN)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, bias = biased(q, k)
        by_token = (x.transpose(1, 2) for x in (q, k, v))  # [B, tokens, H, D]
        out = torch.ops.aten._efficient_attention_forward(
            *by_token, bias, None, None, None, None, 0.0, 0
        )[0]
        return out.transpose(1, 2)

    return call


def xformers(inputs: Inputs) -> Call:
    """xformers with a bias in memory, after a pass for the rows' extremes."""
    from xformers.ops import memory_efficient_attention

    biased = bias_after_statistics(inputs, _ALIGN)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, bias = biased(q, k)
        by_token = (x.transpose(1, 2) for x in (q, k, v))  # [B, tokens, H, D]
        return memory_efficient_attention(*by_token, attn_bias=bias).transpose(1, 2)

    return call


def flash_channels(inputs: Inputs) -> Call:
    """Plain flash attention, the bias as a channel of q and k a region, after a statistics pass."""
    q_channels, k_channels = _one_hot(inputs.q_regions, inputs.k_regions, inputs.q.dtype)
    head_dim, regions = inputs.q.shape[3], q_channels.shape[1]
    room = -(head_dim + regions) % _ALIGN
    flex, _ = compiled_flex(inputs)
    temperature, strength = temperature_and_strength(inputs)
    keys = k_channels.expand(*inputs.k.shape[:2], -1, -1)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # What a matched score gains, unscaled.
        gap = strength * (extent(flex, q, k) * head_dim**0.5)[..., None]
        q = torch.cat((q * temperature, gap.to(q.dtype) * q_channels), -1)
        q = functional.pad(q, (0, room))
        k = functional.pad(torch.cat((k, keys), -1), (0, room))
        v = functional.pad(v, (0, regions + room))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, scale=head_dim**-0.5)[..., :head_dim]

    return call


def _one_hot(q_words: Tensor, k_words: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Channels [M, R] and [N, R] whose product is 1 where words meet, of words of one region."""
    bits = torch.arange(_BITS, dtype=torch.int32, device=q_words.device)
    q_hot, k_hot = ((words[:, None] >> bits) & 1 for words in (q_words, k_words))
    if (q_hot.sum(1) > 1).any():
        raise NotImplementedError("the bias is channels of q and k only where no regions overlap")
    met = (q_hot.any(0) & k_hot.any(0)).nonzero()[:, 0]
    return q_hot[:, met].to(dtype), k_hot[:, met].to(dtype)


def flash_attn(inputs: Inputs) -> Call:
    """Plain attention by the flash-attn package."""
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


GPU_CONTENDERS: dict[str, Callable[[Inputs], Call]] = {
    "dense_attn": raster,
    **by_backend(named),
    "dense_attn-sorted": by_region,
    "dense_attn-no-lists": no_lists,
    "dense_attn-gather": gathered,
    "sdpa": sdpa,
    "sdpa-flash": pinned(SDPBackend.FLASH_ATTENTION),
    "sdpa-cudnn": pinned(SDPBackend.CUDNN_ATTENTION),
    "sdpa-efficient": pinned(SDPBackend.EFFICIENT_ATTENTION),
    "sdpa-math": pinned(SDPBackend.MATH),
    "flash-attn": flash_attn,
    "eager": eager,
    "sdpa-bias": sdpa_bias,
    "efficient-bias": efficient_bias,
    "xformers": xformers,
    "flash-channels": flash_channels,
    "flex-naive": flex_naive,
    "flex-smart": flex_smart,
}
TRAINED = (  # whose backward pass is asked for: the lines to reach, the best of the others
    "dense_attn",
    "dense_attn-sorted",
    "sdpa",
    "sdpa-flash",
    "sdpa-cudnn",
    "sdpa-efficient",
    "flash-attn",
    "eager",
    "flex-smart",
)
# Matrices of scores in memory.
MATERIALISED = ("eager", "sdpa-bias", "sdpa-math", "efficient-bias", "xformers")
