"""The cases of `layout_attention` that every backend runs, their tensors, and the backends."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from placed import copied
from torch import Tensor

from dense_attn import Layout
from dense_attn._backends import table, triton

MODULATIONS = ("range", "max", "bias", "mask")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where the reference in float64 is exact; against itself it is not, nor are some sums reordered.
NARROW = DTYPES[:3]
DEVICES = {backend: table.device_of(backend) for backend in ("reference", "cpu", "triton", "cuda")}
INTERPRETED = triton.interpreted()
TIED = ("equal", "zero", "ties")
SIGN_BIT = -(2**31)
REAL_LAYOUTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "layouts.npz"


@dataclass(frozen=True)
class Case:
    """A call's differences from an ordinary one: small, odd sizes, overlapping regions."""

    name: str
    size: tuple[int, int, int, int, int] = (2, 2, 37, 53, 40)  # B, H, M, N, D
    words: str = "overlapping"
    strength: float | str = "rows"
    values: str = "normal"
    view: str = "contiguous"
    # the outputs that receive a gradient: both, out, lse, or none where gradients are no numbers
    through: str = "both"
    ordered: bool = False  # pass q_order and k_order
    scale: float | None = None
    modulations: tuple[str, ...] = MODULATIONS
    dtypes: tuple[torch.dtype, ...] = DTYPES
    core: bool = False  # every instruction set repeats it


@dataclass
class Inputs:
    """The arguments of one call and the gradients that flow back into it."""

    q: Tensor  # [B, H, M, D]
    k: Tensor  # [B, H, N, D]
    v: Tensor  # [B, H, N, D]
    q_regions: Tensor  # int32 [M] or [B|1, M]
    k_regions: Tensor  # int32 [N] or [B|1, N]
    strength: Tensor  # broadcastable to [B, H, M]
    grad_out: Tensor  # [B, H, M, D]
    grad_lse: Tensor  # [B, H, M]
    orders: dict[str, Tensor] = field(default_factory=dict)
    tied: bool = False  # equal scores, whose first key must stay the first


ONLY_RANGE = ("range",)
HEAD_DIMS = (8, 40, 41, 64, 80, 96, 128, 160, 256)
CASES = (
    *(Case(f"head-dim-{d}", (1, 2, 50, 70, d), core=d in (40, 41, 64, 128)) for d in HEAD_DIMS),
    # Scores of one product are exact, and the reference with them.
    Case("head-dim-1", (1, 2, 50, 70, 1), dtypes=NARROW),
    # Rows and keys around the kernels' tiles: 16, 32 and 48 rows, 8 keys, some thousand keys.
    Case("one-query", (2, 8, 1, 53, 40)),
    # A single key weighs 1 whatever its score: gradients of the output are 0, nothing to measure a
    # rounding by.
    Case("one-key", (2, 2, 37, 1, 40), through="lse", modulations=MODULATIONS[1:], dtypes=NARROW),
    Case("one-key-range", (2, 2, 37, 1, 40), through="none", modulations=ONLY_RANGE, dtypes=NARROW),
    Case("one-by-one", (1, 1, 1, 1, 1), through="lse", modulations=MODULATIONS[1:], dtypes=NARROW),
    Case(
        "one-by-one-range", (1, 1, 1, 1, 1), through="none", modulations=ONLY_RANGE, dtypes=NARROW
    ),
    Case("two-keys", (2, 2, 37, 2, 40)),
    Case("full-tiles", (1, 2, 96, 64, 64)),
    *(
        Case(f"rows-{m}", (1, 1, m, 25, 8), modulations=("range",))
        for m in (15, 16, 17, 31, 33, 47, 48, 49)
    ),
    *(
        Case(f"keys-{n}", (1, 1, 20, n, 8), modulations=("range", "mask"))
        for n in (7, 8, 9, 47, 48, 49)
    ),
    Case("cross-attention", (2, 2, 64, 77, 40), words="phrases", core=True),
    Case("many-keys", (1, 1, 19, 9001, 8), core=True),
    Case("many-keys-in-runs", (1, 1, 50, 8200, 16), words="runs", core=True),
    Case(
        "many-keys-out-of-strip", (1, 1, 5, 20011, 40), words="runs", modulations=("range", "mask")
    ),
    Case("many-rows", (1, 1, 2100, 9, 8), modulations=("range",)),
    Case("no-keys", (2, 2, 37, 0, 40)),
    Case("no-queries", (2, 2, 0, 53, 40)),
    Case("no-batch", (0, 2, 37, 53, 40)),
    Case("no-heads", (2, 0, 37, 53, 40)),
    Case("transposed", view="transposed", core=True),
    Case("every-other-token", view="every-other-token"),
    Case("unaligned", view="unaligned", core=True),
    Case("sliding-windows", view="sliding-windows"),
    Case("negated", view="negated"),
    Case("broadcast-batch", view="broadcast-batch"),
    Case("broadcast-heads", view="broadcast-heads"),
    Case("broadcast-queries", view="broadcast-queries"),
    # Gradients of equal keys and values are 0.
    Case("broadcast-tokens", view="broadcast-tokens", through="none"),
    Case("words-per-sample", words="per-sample", core=True),
    Case("words-of-one-sample", words="one-sample"),
    Case("words-strided", words="strided"),
    Case("all-matched", words="all"),
    Case("none-matched", words="none"),
    Case("some-rows-in-no-region", words="some-none", core=True),
    Case("32-regions", words="32-regions"),
    Case("bit-31", words="bit-31"),
    *(Case(f"strength-{c}", strength=c, core=c == 1.8) for c in (0.0, 0.3, 1.0, 1.8, -0.5)),
    Case("strength-per-batch", strength="per-batch"),
    Case("strength-per-head", strength="per-head"),
    Case("strength-full", strength="full", core=True),
    Case("strength-on-half-the-batch", strength="half-batch"),
    Case("equal-scores", values="equal"),
    Case("zero-queries", values="zero", dtypes=NARROW),
    Case("ties", values="ties", scale=0.5, dtypes=NARROW),
    # The first of equal keys stands in another tile, or in another lane's columns of its own.
    Case("ties-across-tiles", (1, 1, 70, 300, 40), values="ties", scale=-0.5, dtypes=NARROW),
    Case("large-scores", values="large", dtypes=NARROW, core=True),
    Case("nan-in-q", values="nan-in-q", through="none"),
    Case("nan-in-k", values="nan-in-k", through="none"),
    Case("nan-in-v", values="nan-in-v", through="none", modulations=("range", "max", "bias")),
    Case("inf-in-q", values="inf-in-q", through="none"),
    Case("inf-in-k", values="inf-in-k", through="none"),  # scores of -inf leave finite rows
    # So low that a score of 0 beside them would overflow; and of either sign in tiles of one kind.
    Case("low-scores", (1, 2, 17, 23, 64), values="low"),
    Case("low-unmatched", (1, 1, 40, 256, 40), "none", "full", "low", modulations=ONLY_RANGE),
    Case("scale", scale=-0.7),
    Case("ordered", ordered=True, core=True),
    Case("ordered-in-runs", (1, 2, 200, 180, 40), words="runs", ordered=True),
    Case("wide-in-runs", (1, 1, 140, 200, 128), words="runs", ordered=True),
    # Tiles whose pairs all meet, none of them, and some.
    Case("long-in-runs", (1, 1, 1024, 700, 40), "runs", ordered=True, modulations=ONLY_RANGE),
    Case("ordered-per-sample", words="per-sample", ordered=True),
    # All keys count as matched, in whole tiles up to the last key.
    Case("ordered-without-strength", (1, 1, 140, 384, 40), "runs", 0.0, ordered=True),
    Case("gradient-of-out-alone", through="out", core=True),
    Case("gradient-of-lse-alone", through="lse"),
    Case("gradient-of-a-sum", view="expanded-gradient"),
    *(
        (Case("real-layout", (1, 2, 256, 256, 40), words="real", ordered=True),)
        if REAL_LAYOUTS.exists()
        else ()
    ),
)


def why_skip(
    backend: str, op: str = "layout_attention", dtype: torch.dtype = torch.float32
) -> str | None:
    """The table's own reason why this machine cannot test a backend in a dtype, or None."""
    reason = table.unavailable(backend, op)
    if reason is None:
        reason = "; ".join(
            table.why_not(backend, op, torch.empty(1, 8, dtype=dtype, device=DEVICES[backend]))
        )
    return f"{backend}: {reason}" if reason else None


def backends(
    *names: str, op: str = "layout_attention", dtypes: tuple[torch.dtype, ...] = (torch.float32,)
) -> list:
    """Parameters of these backends, or of all; skipped where they lack an op or take none of these
    dtypes. CUDA's is among them where it is emulated.
    """
    params = []
    emulated = ["cuda"] * (bool(names) and DEVICES["cuda"] == "cpu" and "cuda" not in names)
    for backend in (*names, *emulated) or DEVICES:
        reasons = [why_skip(backend, op, dtype) for dtype in dtypes]
        marks = [pytest.mark.gpu] * (DEVICES[backend] == "cuda")
        marks += [] if None in reasons else [pytest.mark.skip(reasons[0])]
        params.append(pytest.param(backend, marks=marks))
    return params


def moved(inputs: Inputs, device: str) -> Inputs:
    """The inputs on a device, with their strides, overlaps, offsets and lazy minus."""
    values = {one.name: getattr(inputs, one.name) for one in fields(inputs)}
    there = {name: copied(x, device) for name, x in values.items() if isinstance(x, Tensor)}
    return replace(
        inputs, **there, orders={name: copied(x, device) for name, x in inputs.orders.items()}
    )


def make_inputs(case: Case, dtype: torch.dtype) -> Inputs:
    """The tensors of a case, the same bits on every run and every machine."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    batch, num_heads, seqlen_q, seqlen_k, head_dim = case.size

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(batch, num_heads, n, head_dim) for n in (seqlen_q, seqlen_k, seqlen_k))
    q, k, v = _values(case.values, q, k, v, generator)
    q_regions, k_regions = _words(case.words, batch, seqlen_q, seqlen_k, generator)
    wide = torch.promote_types(dtype, torch.float32)
    strength = _strength(case.strength, (batch, num_heads, seqlen_q), generator).to(wide)
    grad_out, grad_lse = normal(*q.shape), normal(batch, num_heads, seqlen_q)
    q, k, v, grad_out = (x.to(dtype) for x in (q, k, v, grad_out))
    if case.view == "broadcast-queries":
        q, grad_out = q[:, :, :1].expand_as(q), grad_out[:, :, :1].expand_as(q)
    q, k, v, grad_out = (_view(case.view, x) for x in (q, k, v, grad_out))
    if case.view == "expanded-gradient":  # as sum().backward() makes it
        grad_out = torch.tensor(0.7, dtype=dtype).expand(q.shape)
    orders = {"q_order": _order(q_regions), "k_order": _order(k_regions)} if case.ordered else {}
    words, grads = (q_regions, k_regions), (grad_out, grad_lse.to(wide))
    return Inputs(q, k, v, *words, strength, *grads, orders, case.values in TIED)


def _values(
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
    elif values == "low":
        q, k = 4 + 0.1 * q, -4 + 0.1 * k
    elif values == "inf-in-k":
        k[0, 1, 3, 5] = torch.inf
    elif values == "inf-in-q":
        q[0, 0, 3, 5] = torch.inf
    elif values != "normal":
        {"nan-in-q": q, "nan-in-k": k, "nan-in-v": v}[values][0, 1, 3, 5] = torch.nan
    return q, k, v


def _words(
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


def _strength(
    strength: float | str, rows: tuple[int, int, int], generator: torch.Generator
) -> Tensor:
    batch, num_heads, seqlen_q = rows
    if isinstance(strength, float):
        return torch.tensor(strength)
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


def _view(view: str, x: Tensor) -> Tensor:
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


def _order(words: Tensor) -> Tensor:
    """The tokens by region word: runs of one word, as Layout.order makes them."""
    return words.argsort(stable=True).to(torch.int32)


@cache
def _real_label_maps() -> np.ndarray:
    return np.load(REAL_LAYOUTS)["label_maps"]  # uint8 [200, 128, 128]
