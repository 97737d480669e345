"""DenseDiffusion's range with the extremes of the text block, beside the op's, of the joint row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dense_attn.integrations.diffusers import layers

IMAGE_TOKENS = 64  # in front of the text's


def attention(
    q: Tensor,  # [B, H, M, D], M = N the tokens of both
    k: Tensor,
    v: Tensor,
    q_words: Tensor,  # int32 [B|1, M]
    k_words: Tensor,
    strength: Tensor,  # [B, H, M]
    *,
    scale: float | None,
    **_: object,  # orders and lists change no result
) -> Tensor:
    """Scores of image rows to the text move by `s + c*((max - s)*R - (s - min)*(1 - R))`, with
    max and min over the text's keys alone; all others stay.
    """
    scores = q @ k.mT * (q.shape[3] ** -0.5 if scale is None else scale)
    block = scores[:, :, :IMAGE_TOKENS, IMAGE_TOKENS:]
    own = (q_words[:, :IMAGE_TOKENS, None] & k_words[:, None, IMAGE_TOKENS:]).ne(0)[:, None]
    ends = torch.where(own, block.amax(-1, keepdim=True), block.amin(-1, keepdim=True))
    moved = torch.lerp(block, ends, strength[:, :, :IMAGE_TOKENS, None].to(block.dtype))
    scores = scores.clone()
    scores[:, :, :IMAGE_TOKENS, IMAGE_TOKENS:] = moved
    return scores.softmax(-1) @ v


@contextmanager
def of_the_text() -> Iterator[None]:
    """Layouts of blocks `image->text` inside take these extremes, whatever their modulation."""
    before = layers.layout_attention
    layers.layout_attention = attention
    try:
        yield
    finally:
        layers.layout_attention = before
