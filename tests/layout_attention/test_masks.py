"""Masks of attention layers, reduced to keys: each equals scaled_dot_product_attention's."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dense_attn import layout_attention
from dense_attn.layout_attention import keys, masks
from dense_attn.layout_attention.masks import reduced

BATCH, HEADS, TOKENS = 2, 3, 7
THERE = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1]], dtype=torch.bool)
PAIRS = THERE[:, None, :, None] & THERE[:, None, None, :]
ONES = THERE.float()
MASKS = {
    "one row": THERE[:1, None, None],
    "a row a sample": THERE[:, None, None],
    "heads and queries expanded": THERE[:, None, None].expand(-1, HEADS, TOKENS, -1),
    "heads copied": THERE[:, None, None].repeat(1, HEADS, 1, 1),
    "pairs of two dimensions": PAIRS[0, 0],
    "pairs": PAIRS,
    "pairs whose padding sees the first": PAIRS | (torch.arange(TOKENS) == 0),
    "-1e4": (1 - ONES)[:, None, None] * -1e4,
    "-1e4 of bfloat16": ((1 - ONES)[:, None, None] * -1e4).bfloat16().float(),
    "-1e4 in copied heads": ((1 - ONES)[:, None, None] * -1e4).repeat(1, HEADS, 1, 1),
    "the least number": torch.where(PAIRS, 0.0, torch.finfo(torch.float32).min),
    "ones that are added": ONES[:, None, None],
    "pairs of ones that are added": ONES[:, None, :, None] * ONES[:, None, None],
    "pairs of ones below 0": ONES[:, None, :, None] * -ONES[:, None, None],
    "pairs of sums of both signs": ONES[:, None, :, None] * torch.linspace(-0.5, 0.7, TOKENS),
}


def qkv() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, BATCH, HEADS, TOKENS, 8, generator=generator).unbind(0)


def plain(words: Tensor, q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
    return layout_attention(q, k, v, words, words, 0.0, **options)


@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_reduced_mask_is_the_mask(mask: Tensor, scale: float | None) -> None:
    q, k, v = qkv()
    words = torch.ones(TOKENS, dtype=torch.int32)
    ours = reduced(mask, q, k, same_tokens=True)
    out = ours.attention(q, k, v, scale, partial(plain, words))
    right = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    padding = mask.dtype == torch.bool or bool((mask < -1).any())
    own = THERE[:1].expand(BATCH, -1) if mask.dim() == 2 else THERE
    rows = own if padding and mask.shape[-2] > 1 else torch.ones_like(THERE)
    for one, other, there in zip(out, right, rows):
        torch.testing.assert_close(one[:, there], other[:, there])
    assert out.is_contiguous() == right.is_contiguous()


def test_masks_that_only_remove_keys_add_nothing() -> None:
    q, k, _ = qkv()
    assert reduced(MASKS["-1e4 of bfloat16"], q, k).keys.tolist() == THERE.tolist()
    assert (
        reduced(MASKS["the least number"], q, k, same_tokens=True).keys.tolist() == THERE.tolist()
    )


def test_what_removes_a_key_is_said_once() -> None:
    """Both kinds of masks remove from the number that the op's docstring has."""
    q, k, _ = qkv()
    assert torch.tensor(-1e4).bfloat16().item() == keys.REMOVED
    told = " ".join(layout_attention.__doc__.split())
    assert "-1e4 (-9984, as bfloat16 has it) or less" in told
    for number, removed in ((-9984.0, True), (-9983.0, False)):
        mask = torch.zeros(1, TOKENS)
        mask[0, 0] = number
        left, bias = keys.of_mask(mask, q, k)
        assert (left is not None) == (bias is None) == removed
        assert (reduced(mask, q, k).keys.dtype == torch.bool) == removed


REFUSED = {
    "a causal one": torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(),
    "a causal one of floats": torch.zeros(TOKENS, TOKENS).masked_fill(
        ~torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(), -torch.inf
    ),
    "other heads": torch.stack((THERE, ~THERE, THERE), 1)[:, :, None],
    "a bias of pairs": torch.linspace(0, 1, TOKENS * TOKENS).view(TOKENS, TOKENS),
    "sums below 0 of two kinds": -torch.eye(TOKENS),
    "a query without keys": torch.zeros(TOKENS, TOKENS).index_fill(
        0, torch.tensor([2]), -torch.inf
    ),
    "other sizes": torch.ones(1, 1, 1, TOKENS + 1, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", REFUSED.values(), ids=REFUSED)
def test_other_masks_are_refused(mask: Tensor) -> None:
    q, k, _ = qkv()
    with pytest.raises(ValueError, match=r"^attention_mask must say which keys there are, for all"):
        reduced(mask, q, k, same_tokens=True)


@pytest.mark.parametrize("name", ["pairs", "pairs whose padding sees the first"])
def test_queries_of_other_tokens_are_no_padding(name: str) -> None:
    """A row of as many queries as keys is a query's own, whichever key its number removes."""
    q, k, _ = qkv()
    for mask in (MASKS[name], torch.where(MASKS[name], 0.0, -1e4)):
        assert reduced(mask, q, k, same_tokens=True).keys.tolist() == THERE.tolist()
        with pytest.raises(ValueError, match=r"^attention_mask must say which keys there are"):
            reduced(mask, q, k)


def test_compiled() -> None:
    """A graph without a break; what it cannot look at it asserts."""
    q, k, v = qkv()
    words = torch.ones(TOKENS, dtype=torch.int32)

    def run(mask: Tensor) -> Tensor:
        return reduced(mask, q, k, same_tokens=True).attention(q, k, v, None, partial(plain, words))

    torch._dynamo.reset()
    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for name in ("a row a sample", "heads copied", "-1e4 in copied heads", "pairs"):
        torch.testing.assert_close(compiled(MASKS[name]), run(MASKS[name]))
    for name in ("pairs of ones that are added", "pairs of ones below 0"):
        torch.testing.assert_close(compiled(MASKS[name]), run(MASKS[name]))
    with pytest.raises(RuntimeError, match="which keys there are"):
        compiled(REFUSED["other heads"])


def test_a_mask_is_reduced_once_until_it_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all layers of a call; and what is kept lives no longer than the mask."""
    (q, k, _), looks = qkv(), []
    own = masks.reduced
    monkeypatch.setattr(masks, "reduced", lambda *x: (looks.append(x[0].shape), own(*x))[1])

    def keys_of(first: int, last: int, mask: Tensor) -> list:
        return masks.of_call(
            {"attn_mask": mask}, first, last, q[first:last], k, False
        ).keys.tolist()

    mask = THERE[:, None, None].clone()
    for _ in range(3):
        assert keys_of(0, 2, mask) == THERE.tolist()
    assert len(looks) == 1
    assert keys_of(1, 2, mask) == THERE[1:].tolist()
    assert keys_of(0, 2, mask.clone()) == THERE.tolist()
    assert len(looks) == 3
    mask[0, 0, 0, 0] = False
    assert keys_of(1, 2, mask) == THERE[1:].tolist()
    assert keys_of(0, 2, mask)[0][0] is False
    assert len(looks) == 5
    with torch.inference_mode():
        uncounted = THERE[:, None, None].clone()
        assert keys_of(0, 2, uncounted) == keys_of(0, 2, uncounted) == THERE.tolist()
    assert len(looks) == 7
    assert keys_of(0, 2, mask[:]) == keys_of(0, 2, mask[:]) == keys_of(0, 2, mask)
    assert len(looks) == 7  # a view of all is of the same form
    gone = weakref.ref(mask)
    del mask
    gc.collect()
    assert gone() is None


def test_masks_of_one_source_are_reduced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers that make their own; until any source changes or is another."""
    (q, k, _), looks = qkv(), []
    own = masks.reduced
    monkeypatch.setattr(masks, "reduced", lambda *x: (looks.append(x[0].shape), own(*x))[1])
    sources = [THERE.clone(), torch.ones(1)]

    def look() -> int:
        made = {"attn_mask": sources[0][:, None, None] & (sources[1] > 0)}
        assert masks.of_call(made, 0, 2, q, k, False, tuple(sources)).keys.shape == THERE.shape
        return len(looks)

    assert [look() for _ in range(3)] == [1, 1, 1]
    sources[0][0, 0] = False
    assert [look() for _ in range(2)] == [2, 2]
    sources[1] = sources[1].clone()
    assert [look() for _ in range(2)] == [3, 3]
    sources[1].mul_(1)
    assert [look() for _ in range(2)] == [4, 4]
