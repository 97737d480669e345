"""The cases of `layout_attention` that every backend runs, their tensors, and the backends."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field, fields, replace

import pytest
import torch
from case_tensors import (
    REAL_LAYOUTS,
    mask_of,
    order_of,
    strength_of,
    values_of,
    view_of,
    words_of,
)
from placed import copied
from torch import Tensor

from dense_attn._backends import table, triton

MODULATIONS = ("range", "max", "bias", "mask")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Where the reference in float64 is exact; against itself it is not, nor are some sums reordered.
NARROW = DTYPES[:3]
DEVICES = {backend: table.device_of(backend) for backend in ("reference", "cpu", "triton", "cuda")}
INTERPRETED = triton.interpreted()
TIED = ("equal", "zero", "ties")


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
    group: int = 1  # heads of q that meet one of k and v
    keys: tuple[int, ...] | str = ""  # how many are there of each sample, or which: k_mask
    scale: float | None = None
    modulations: tuple[str, ...] = MODULATIONS
    dtypes: tuple[torch.dtype, ...] = DTYPES
    core: bool = False  # every instruction set repeats it


@dataclass
class Inputs:
    """The arguments of one call and the gradients that flow back into it."""

    q: Tensor  # [B, H, M, D]
    k: Tensor  # [B, H / G, N, D]
    v: Tensor  # [B, H / G, N, D]
    q_regions: Tensor  # int32 [M] or [B|1, M]
    k_regions: Tensor  # int32 [N] or [B|1, N]
    strength: Tensor  # broadcastable to [B, H, M]
    grad_out: Tensor  # [B, H, M, D]
    grad_lse: Tensor  # [B, H, M]
    orders: dict[str, Tensor] = field(default_factory=dict)
    k_mask: Tensor | None = None  # int32 [B], bool [N] or [B, N]
    tied: bool = False  # equal scores, whose first key must stay the first


ONLY_RANGE, EXTREMES = ("range",), ("range", "max")
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
    # Special values in whole tiles of GPUs, of each kind: `test_whole_tiles_of_each_kind`.
    Case(
        "strengths-in-whole-tiles",
        (3, 2, 20, 384, 40),
        "two-halves-per-sample",
        "special",
        "equal",
        modulations=EXTREMES,
    ),
    Case(
        "no-numbers-in-whole-tiles",
        (1, 6, 20, 384, 40),
        "two-halves",
        values="no-numbers",
        modulations=EXTREMES,
    ),
    Case("scale", scale=-0.7),
    Case("ordered", ordered=True, core=True),
    Case("ordered-in-runs", (1, 2, 200, 180, 40), words="runs", ordered=True),
    Case("wide-in-runs", (1, 1, 140, 200, 128), words="runs", ordered=True),
    # Tiles whose pairs all meet, none of them, and some.
    Case("long-in-runs", (1, 1, 1024, 700, 40), "runs", ordered=True, modulations=ONLY_RANGE),
    Case("ordered-per-sample", words="per-sample", ordered=True),
    # More keys than a tile, of GPUs in doubt alone; on the CPU a factor of 0 in tiles of one
    # population too; anchors that move.
    *(Case(f"keys-150-head-dim-{d}", (1, 1, 40, 150, d), "runs") for d in HEAD_DIMS[3:]),
    # More than 80 keys, with which CUDA's row kernel takes 128 columns.
    *(
        Case(f"keys-100-columns-{d}", (1, 1, 40, 100, d), "runs")
        for d in (HEAD_DIMS[1], *HEAD_DIMS[3:])
    ),
    Case("runs-at-strength-1", (1, 1, 33, 400, 40), "runs", 1.0, modulations=ONLY_RANGE),
    Case("rising-scores", (1, 1, 33, 400, 40), "runs", values="rising", through="none"),
    # All keys count as matched, in whole tiles up to the last key.
    Case("ordered-without-strength", (1, 1, 140, 384, 40), "runs", 0.0, ordered=True),
    # Keys that are there: none, one, an odd number, all but one, all; in front and anywhere.
    Case("keys-counted", (5, 2, 20, 53, 40), keys=(0, 2, 7, 52, 53), core=True),
    Case(
        "low-scores-counted", (2, 2, 17, 53, 40), values="low", keys=(9, 33), modulations=EXTREMES
    ),
    Case(
        "high-scores-counted",
        (2, 2, 17, 53, 40),
        values="low",
        keys=(9, 33),
        scale=-0.16,
        modulations=EXTREMES,
    ),
    Case("no-keys-at-strength-1", (2, 1, 20, 150, 8), strength=1.0, keys=(140, 0), core=True),
    Case("one-key-counted", (3, 2, 20, 53, 40), keys=(1, 0, 1), through="none"),
    Case("keys-counted-in-runs", (3, 1, 70, 300, 40), "runs", keys=(130, 0, 300), ordered=True),
    Case(
        "many-keys-counted", (2, 1, 19, 9001, 8), keys=(4100, 9001), modulations=("range", "mask")
    ),
    Case("keys-anywhere", (3, 2, 37, 53, 40), "per-sample", "full", keys="anywhere", core=True),
    Case("keys-anywhere-for-all", (2, 2, 37, 77, 40), "phrases", keys="anywhere-for-all"),
    Case("keys-anywhere-in-runs", (2, 1, 70, 300, 64), "runs", keys="anywhere", ordered=True),
    *(Case(f"groups-of-{g}", (2, 2 * g, 20, 53, 40), group=g, core=g == 3) for g in (2, 3, 4)),
    Case("one-group-of-8", (1, 8, 20, 53, 80), strength="per-head", view="transposed", group=8),
    Case("groups-in-runs", (1, 4, 200, 180, 64), "runs", ordered=True, group=2),
    Case(
        "groups-of-some-keys",
        (3, 6, 37, 53, 40),
        "runs",
        "full",
        group=3,
        keys="anywhere",
        core=True,
    ),
    Case("gradient-of-out-alone", through="out", core=True),
    Case("gradient-of-lse-alone", through="lse"),
    Case("gradient-of-a-sum", view="expanded-gradient"),
    *(
        (Case("real-layout", (1, 2, 256, 256, 40), words="real", ordered=True),)
        if REAL_LAYOUTS.exists()
        else ()
    ),
)
# Those that half tiles take too, by every row of the tables that has some; a GPU, which has more
# processors than these have tiles, takes halves anyway.
HALVED = (
    *("ordered-in-runs", "groups-in-runs", "wide-in-runs", "keys-anywhere-in-runs"),
    *(f"keys-150-head-dim-{d}" for d in (80, 96, 160)),
)
# Those whose queries several programs share as well, which on a GPU they are too few for: of one
# or more tiles a program, and of fewer tiles than programs.
SPLIT = (
    *("cross-attention", "ordered-in-runs", "wide-in-runs"),
    *("groups-in-runs", "keys-counted-in-runs"),
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


def backends(*names: str, op: str = "layout_attention", dtypes: tuple = (torch.float32,)) -> list:
    """Parameters of these backends, of all, or of these and an emulated CUDA's; skipped with their
    reason where they lack an op or take none of these dtypes.
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

    heads_and_tokens = ((num_heads, seqlen_q), *[(num_heads // case.group, seqlen_k)] * 2)
    q, k, v = (normal(batch, *sizes, head_dim) for sizes in heads_and_tokens)
    q, k, v = values_of(case.values, q, k, v, generator)
    q_regions, k_regions = words_of(case.words, batch, seqlen_q, seqlen_k, generator)
    wide = torch.promote_types(dtype, torch.float32)
    strength = strength_of(case.strength, (batch, num_heads, seqlen_q), generator).to(wide)
    grad_out, grad_lse = normal(*q.shape), normal(batch, num_heads, seqlen_q)
    q, k, v, grad_out = (x.to(dtype) for x in (q, k, v, grad_out))
    if case.view == "broadcast-queries":
        q, grad_out = q[:, :, :1].expand_as(q), grad_out[:, :, :1].expand_as(q)
    q, k, v, grad_out = (view_of(case.view, x) for x in (q, k, v, grad_out))
    if case.view == "expanded-gradient":  # as sum().backward() makes it
        grad_out = torch.tensor(0.7, dtype=dtype).expand(q.shape)
    orders = (
        {"q_order": order_of(q_regions), "k_order": order_of(k_regions)} if case.ordered else {}
    )
    words, grads = (q_regions, k_regions), (grad_out, grad_lse.to(wide))
    k_mask = mask_of(case.keys, batch, seqlen_k, generator)
    return Inputs(q, k, v, *words, strength, *grads, orders, k_mask, case.values in TIED)
