"""Masks of pairs: rows of padding may see what they will, and queries are padding in self-attention
alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from dense_attn.integrations.diffusers import _attention_hook as hook
from dense_attn.integrations.diffusers.state import LayoutState

THERE = torch.arange(6) < 4
PAIRS = torch.where(THERE[:, None] & THERE, 0.0, -1e4).expand(3, 6, 6)


@pytest.mark.parametrize("order", [torch.arange(6)[None], None])
def test_a_layout_knows_layers_of_self_attention(order: Tensor | None) -> None:
    """They have an order of keys."""
    words = torch.zeros(1, 6, dtype=torch.int32)
    layer = SimpleNamespace(q_words=words, k_words=words, k_order=order)
    state = SimpleNamespace(layers={("self", 0): layer}, first=1, last=2, sources=())
    expected = LayoutState.expected(state, "self", 0)
    assert expected == hook.Expected(1, 2, 6, 6, same_tokens=order is not None)


@torch.no_grad()
def test_queries_are_padding_where_they_are_the_keys() -> None:
    layer, seen = Attention(16, heads=2, dim_head=8).eval(), []

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: object) -> Tensor:
        seen.append(mask.keys.tolist())
        return q

    def call(same_tokens: bool) -> None:
        expected = hook.Expected(0, 3, 6, 6, same_tokens)
        mark = SimpleNamespace(expected=lambda: expected, attend=attend)
        with hook.marked([(layer, mark)]):
            layer(torch.zeros(3, 6, 16), attention_mask=PAIRS)

    call(True)
    assert seen == [[THERE.tolist()] * 3]
    with pytest.raises(ValueError, match=r"^attention_mask must say which keys there are"):
        call(False)
