"""Tile lists of layers, which are made once for all that share a shape and a mask.

On the CPU, whose kernels have none, it is counted how often they are asked for; a run with Triton
(`tests/backends/test_interpreted.py`) has them.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from cases import DEVICES, why_skip
from families import family, run
from torch import Tensor

from dense_attn import layout_attention
from dense_attn.integrations.diffusers import apply_layout, layers

pytestmark = pytest.mark.usefixtures("one_thread")
BACKEND = "auto" if why_skip("triton") else "triton"
DEVICE = DEVICES["triton"] if BACKEND == "triton" else "cpu"
TOKENS, OPTIONS = 150, SimpleNamespace(modulation="bias", backend=BACKEND)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The mask of each time that lists are made."""
    found, own = [], layers.tile_lists

    def watched(*tensors: Tensor, **how: object) -> object:
        found.append(how["k_mask"])
        made = own(*tensors, **how)
        assert BACKEND == "auto" or made is not None
        return made

    monkeypatch.setattr(layers, "tile_lists", watched)
    return found


@pytest.fixture
def call() -> Callable[[Tensor | None], Tensor]:
    """A call of layers of one kind, whose result is checked against one without lists."""
    q, k, v = torch.randn(3, 2, 1, TOKENS, 16, device=DEVICE).unbind(0)
    words = (torch.arange(TOKENS, device=DEVICE) % 3)[None].int()
    strength = torch.rand(1, 1, TOKENS, device=DEVICE)
    order = layers.order_of(layers.Side(words, strength[0]))
    layer = layers.Layer(words, words, strength, order, order, strength)

    def attention(mask: Tensor | None) -> None:
        rows = slice(2 if mask is None else len(mask))
        tensors = q[rows], k[rows], v[rows]
        out = layer.attention(*tensors, options=OPTIONS, scale=None, k_mask=mask)
        how = {"modulation": "bias", "k_mask": mask, "backend": "reference"}
        exact = layout_attention(*tensors, words, words, strength, **how)
        torch.testing.assert_close(out, exact, rtol=1e-5, atol=1e-5)

    attention.layer = layer
    return attention


def valid(*counts: int) -> Tensor:
    """A mask of keys that has so many in each sample."""
    there = torch.arange(TOKENS) < torch.tensor(counts)[:, None]
    return there.to(DEVICE)


def test_layers_of_one_mask_share_lists(call: Callable, asked: list) -> None:
    """Until the mask changes, and no other mask's; one without a mask has its own."""
    mask, other = valid(40, 120), valid(150, 90)
    for given, times in ((mask, 1), (mask, 1), (None, 2), (None, 2), (other, 3), (mask, 3)):
        call(given)
        assert len(asked) == times
    mask[:, 0] = False
    call(mask)
    call(mask)
    assert len(asked) == 4


def test_rows_of_a_mask_share_lists(call: Callable, asked: list) -> None:
    """Views that are made anew in each layer, while what they are of has not changed."""
    mask, looks = valid(40, 120), []
    for row in (0, 0, 1, 1):
        call(mask[row : row + 1])
        looks.append(len(asked))
    assert looks == [1, 1, 2, 2]
    mask[1, 0] = False
    call(mask[1:])
    assert len(asked) == 3


def test_lists_live_no_longer_than_their_mask(call: Callable, asked: list) -> None:
    mask = valid(40, 120)
    call(mask[:])
    gone, kept = weakref.ref(mask), call.layer.lists.of_masks.owners
    assert len(kept) == 1
    del mask
    asked.clear()
    gc.collect()
    assert (gone(), len(kept)) == (None, 0)


def test_a_mask_whose_changes_are_not_counted_keeps_none(call: Callable, asked: list) -> None:
    with torch.inference_mode():
        mask = valid(40, 120)
        call(mask)
        mask[:, 0] = False
        call(mask)
    assert asked == []


@pytest.mark.parametrize(("name", "runs"), [("qwen", 1), ("z_image", 2)])
def test_lists_of_pipelines_are_made_once_a_mask(
    name: str, runs: int, calls: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For all layers of a kind; and of Z-Image's steps, which make their texts' masks anew."""
    own, asked = layers.tile_lists, []
    monkeypatch.setattr(
        layers, "tile_lists", lambda *x, **how: (asked.append(how["k_mask"]), own(*x, **how))[1]
    )
    prompts = ["a cat dog", "dog and a small cat"]
    more = {"negative_prompt": ["fog" if name != "z_image" else 12 * "fog "] * 2}
    left = [("cat", (0.0, 0.0, 0.5, 1.0))]
    with apply_layout(family(name), prompts, [left] * 2, active=1.0):
        run(name, prompts, steps=2, **more)
    assert all(mask is not None for mask in asked)
    assert len(asked) == runs < len(calls)


def test_strengths_are_spread_once_a_step(call: Callable) -> None:
    layer, q = call.layer, torch.zeros(2, 3, TOKENS, 16, device=DEVICE)
    first = layer._strength(q)
    assert layer._strength(q) is first
    assert torch.equal(first, layer.now.expand(2, 3, TOKENS))
    layer.now = layer.strength * 0.5
    assert torch.equal(layer._strength(q), layer.now.expand(2, 3, TOKENS))
    assert layer._strength(q[:1]).shape == (1, 3, TOKENS)
