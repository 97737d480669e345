"""The tensors of a case of `layout_attention`, by what its fields name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dense_attn import Layout

SIGN_BIT = -(2**31)
REAL_LAYOUTS = Path(__file__).resolve().parents[4] / "shared" / "data" / "layouts.npz"


def values_of(
    values: str, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    if values == "equal":
        k[:, 0] = k[:, 0, :1]  # in one head; the other measures the rounding
    elif values == "zero":
        q = torch.zeros_like(q)
    elif values == "ties":  # small integers: every score is exact in every dtype
        q, k = (torch.randint(-1, 2, x.shape, generator=generator).double() for x in (q, k))
    elif values == "large":
        q = q * (1e4 * q.shape[-1] ** 0.5 / (q @ k.mT).abs().max())
    elif values == "rising":  # the last keys weigh 2**90 times what the first do
        q, k = 0.2 * q + 1, 0.2 * k + torch.linspace(-5, 5, k.shape[2], dtype=k.dtype)[:, None]
    elif values == "low":
        q, k = 4 + 0.1 * q, -4 + 0.1 * k
    elif values == "no-numbers":  # a head each for a key of every kind of tile of "two-halves"
        for head, (nan, inf) in enumerate(((3, 3), (197, 203), (300, 300))):
            k[0, head, nan, 5], k[0, 3 + head, inf, 5] = torch.nan, torch.inf
        q[0, 3, 3, 5], q[0, 3, 5, 5] = torch.nan, torch.inf
    elif values == "inf-in-k":
        k[0, 1, 3, 5] = torch.inf
    elif values == "inf-in-q":
        q[0, 0, 3, 5] = torch.inf
    elif values != "normal":
        {"nan-in-q": q, "nan-in-k": k, "nan-in-v": v}[values][0, 1, 3, 5] = torch.nan
    return q, k, v


def words_of(
    words: str, batch: int, seqlen_q: int, seqlen_k: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    def both(make) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        return make(seqlen_q), make(seqlen_k)

    if words == "phrases":  # a picture in three bands, a prompt with two phrases
        k_words = torch.zeros(seqlen_k, dtype=torch.int32)
        k_words[2:5], k_words[6:9] = 1, 2
        return torch.arange(seqlen_q, dtype=torch.int32) * 3 // max(seqlen_q, 1), k_words
    if words.startswith("two-halves"):
        return _halves(seqlen_q, seqlen_k, "per-sample" in words)
    if words == "real":
        side = round(seqlen_q**0.5)
        layout = Layout.from_label_map(_real_label_maps()[7].astype(np.int64))
        return (layout.query_regions(side, side),) * 2
    makers = {
        "overlapping": lambda n: integers(16, n),
        "runs": lambda n: (
            1 << (torch.arange(n, dtype=torch.int32) * 5 // max(n, 1))
        ),  # uniform tiles and mixed ones
        "per-sample": lambda n: integers(8, batch, n),
        "one-sample": lambda n: integers(8, 1, n),
        "strided": lambda n: integers(8, batch, 2 * n)[:, ::2],
        "all": lambda n: torch.full((n,), 5, dtype=torch.int32),
        "none": lambda n: torch.zeros(n, dtype=torch.int32),
        "some-none": lambda n: integers(4, n) * (integers(3, n) == 0),
        "32-regions": lambda n: 1 << integers(32, n),
        "bit-31": lambda n: integers(2, n) * SIGN_BIT + integers(2, n),
    }
    return both(makers[words])


def _halves(seqlen_q: int, seqlen_k: int, per_sample: bool) -> tuple[Tensor, Tensor]:
    """All rows match a first half of the keys, which ends inside of a tile. With samples: those,
    each second row alone, and all pairs.
    """
    rows, keys = torch.ones(seqlen_q, dtype=torch.int32), torch.ones(seqlen_k, dtype=torch.int32)
    halves = keys + (torch.arange(seqlen_k) >= seqlen_k // 2 + 8)
    if not per_sample:
        return rows, halves.int()
    some = torch.arange(seqlen_q) % 2
    return torch.stack([rows, some.int(), rows]), torch.stack([halves, halves, keys]).int()


def mask_of(
    keys: tuple[int, ...] | str, batch: int, seqlen_k: int, generator: torch.Generator
) -> Tensor | None:
    if not keys:
        return None
    if isinstance(keys, tuple):
        return torch.tensor(keys, dtype=torch.int32)
    shape = (seqlen_k,) if keys == "anywhere-for-all" else (batch, seqlen_k)
    return torch.rand(shape, generator=generator) < 0.7


def strength_of(
    strength: float | str, rows: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    batch, num_heads, seqlen_q = rows
    if isinstance(strength, float):
        return torch.tensor(strength)
    if strength == "special":  # temperatures of 0, of either sign, and none of a strength
        return torch.tensor([1.0, 1.8, -0.5, 0.0, 0.4]).repeat(seqlen_q // 5)
    shape = {
        "rows": (seqlen_q,),
        "per-batch": (batch, 1, 1),
        "per-head": (num_heads, 1),
        "full": rows,
        "half-batch": (batch, 1, seqlen_q),
    }[strength]
    values = torch.rand(shape, generator=generator) * 2.4 - 0.6
    if strength == "half-batch":
        values[: batch // 2] = 0
    return values


def view_of(view: str, x: Tensor) -> Tensor:
    """The values of x [B, H, tokens, D], or some repeated, under the strides that a view names."""
    if view == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if view == "every-other-token":
        return x.repeat_interleave(2, 2)[:, :, ::2]
    if view == "unaligned":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    if view == "sliding-windows":  # token i + 1 begins one element after token i: rows overlap
        flat = torch.cat([x.flatten(), x.new_zeros(x.shape[3])])
        return flat.as_strided(x.shape, (*x.stride()[:2], 1, 1))
    if view == "negated":  # a lazy minus, as the imaginary part of a conjugate has it
        return torch._neg_view(-x)
    broadcast = {
        "broadcast-batch": x[:1],
        "broadcast-heads": x[:, :1],
        "broadcast-tokens": x[:, :, :1],
    }
    return broadcast.get(view, x).expand(x.shape)


def order_of(words: Tensor) -> Tensor:
    """The tokens by region word: runs of one word, as Layout.order makes them."""
    return words.argsort(stable=True).to(torch.int32)


@cache
def _real_label_maps() -> np.ndarray:
    return np.load(REAL_LAYOUTS)["label_maps"]  # uint8 [200, 128, 128]
