"""Tile lists by their public names; `triton_lists.py` checks what stands in them."""

from __future__ import annotations

import pytest
import torch
from cases import why_skip

from dense_attn import layout_attention, tile_lists

Q = torch.randn(1, 2, 20, 8)
WORDS = torch.ones(20, dtype=torch.int32)
BACKENDS = ["reference", *(["cpu"] if why_skip("cpu") is None else [])]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_without_lists_makes_none_and_ignores_those_of_others(backend: str) -> None:
    assert (
        tile_lists(Q, Q, WORDS, WORDS, q_order=WORDS.cumsum(0).int() - 1, backend=backend) is None
    )
    plain = layout_attention(Q, Q, Q, WORDS, WORDS, backend=backend)
    other = (*(torch.zeros(3, 1, n, dtype=torch.int32) for n in (2, 3, 4)), None, None)
    assert torch.equal(
        layout_attention(Q, Q, Q, WORDS, WORDS, tile_lists=other, backend=backend), plain
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": Q[0]}, "q must have 4 dimensions"),
        ({"k": Q.double()}, "k must have q's dtype float32, got float64"),
        (
            {"q_regions": WORDS[1:]},
            r"q_regions must have shape \[20\], \[1, 20\] or \[1, 20\], got \(19,\)",
        ),
        ({"k_order": WORDS.long()}, "k_order must be int32, got int64"),
        (
            {"backend": "gpu"},
            "backend must be one of auto, cuda, triton, cpu, reference, got 'gpu'",
        ),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    arguments = {"q": Q, "k": Q, "q_regions": WORDS, "k_regions": WORDS} | change
    with pytest.raises((ValueError, TypeError), match=message):
        tile_lists(**arguments)


LISTS = (WORDS, WORDS, WORDS)


@pytest.mark.parametrize(
    "lists", [WORDS, LISTS, "lists", (WORDS, WORDS, None, WORDS, WORDS), (*LISTS, WORDS, False)]
)
def test_what_are_no_lists_is_refused(lists: object) -> None:
    with pytest.raises(
        TypeError, match=r"tile_lists must be (what tile_lists returns|a tensor), got"
    ):
        layout_attention(Q, Q, Q, WORDS, WORDS, tile_lists=lists)


@pytest.mark.parametrize(
    ("own", "given", "got"), [(None, WORDS, "an order"), (WORDS, False, "raster")]
)
@pytest.mark.parametrize("name", ["q_order", "k_order"])
def test_another_order_than_that_of_the_lists_is_refused(
    name: str, own: torch.Tensor | None, given: object, got: str
) -> None:
    lists = (*LISTS, *(own if name == order else None for order in ("q_order", "k_order")))
    with pytest.raises(ValueError, match=f"{name} must be that of tile_lists, or None, got {got}"):
        layout_attention(Q, Q, Q, WORDS, WORDS, tile_lists=lists, **{name: given})
