"""The share found of the faults that kernels have without one of their instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from cases import Case, Inputs, make_inputs
from torch import Tensor

pytest.importorskip("triton")

import triton
from ptx.mutations import kernels, mutants

from dense_attn.triton_kernels import configs, layout_attention, sega
from dense_attn.triton_kernels.sega import selection

pytestmark = pytest.mark.usefixtures("poisoned_memory", "one_thread")
BFLOAT16, FLOAT16, FLOAT32 = torch.bfloat16, torch.float16, torch.float32


def inputs(
    seqlen_q: int, seqlen_k: int, head_dim: int, dtype: torch.dtype
) -> tuple[Inputs, tuple[Tensor, ...]]:
    """A case and its first arguments: a third of the keys matches each query, a third none, and in
    the middle they take turns, so that there are tiles of every kind.
    """
    case = make_inputs(Case("mutated", (1, 1, seqlen_q, seqlen_k, head_dim)), dtype)
    queries, keys = torch.ones(seqlen_q), torch.arange(seqlen_k)
    part = 3 * keys // seqlen_k
    words = torch.where(part == 1, 1 + keys % 2, 1 + part // 2)
    words = (queries.int(), words.int())
    return case, (case.q, case.k, case.v, *words, case.strength.expand(case.q.shape[:3]))


def forward(seqlen_q: int, seqlen_k: int, head_dim: int, dtype: torch.dtype) -> None:
    """In an order of the tokens, where there is one."""
    _, tensors = inputs(seqlen_q, seqlen_k, head_dim, dtype)
    orders = (torch.arange(n - 1, -1, -1, dtype=torch.int32) for n in (seqlen_q, seqlen_k))
    row = seqlen_k <= configs.ROW_KEYS and dtype != FLOAT32
    layout_attention.layout_attention_fwd(*tensors, "range", 0.3, *(() if row else orders))


def backward(
    seqlen_q: int, seqlen_k: int, head_dim: int, dtype: torch.dtype, modulation: str = "range"
) -> None:
    """Both passes, and the forward pass that they need."""
    case, tensors = inputs(seqlen_q, seqlen_k, head_dim, dtype)
    out, _, stats = layout_attention.layout_attention_fwd(*tensors, modulation, 0.3)
    grads, last = (case.grad_out, case.grad_lse), (out, stats, modulation, 0.3)
    layout_attention.layout_attention_bwd(*grads, *tensors, *last)


def percentile(dtype: torch.dtype) -> None:
    sega.percentile_mask(torch.randn(2, 1100).to(dtype), 0.77)


def guidance(num_values: int) -> None:
    """Two concepts, with and without a sum over the channels."""
    uncond, text, momentum = torch.randn(3, 1, 2, num_values)
    options = {
        "guidance_scale": 7.5,
        "edit_guidance_scale": [5.0, -3.0],
        "edit_threshold": [0.9, 0.37],
        "weights": [1.0, 2.0],
        "partials": [0.0, 0.0],
        "all_warm": True,
        "reverse": [False, True],
        "edit_momentum_scale": 0.3,
        "edit_mom_beta": 0.4,
    }
    for sums in (False, True):
        edits = torch.randn(2, 1, 2, num_values)
        sega.sega_guidance(uncond, text, edits, momentum, **options, sum_channels=sums)


FORWARD, ROWS = "layout_attention_fwd_kernel", "layout_attention_row_fwd_kernel"
BACKWARD = ("layout_attention_bwd_q_kernel", "layout_attention_bwd_kv_kernel")
# The calls, and the kernels of them that are mutated; None: all.
CALLS: dict[str, tuple[Callable[..., None], tuple, tuple[str, ...] | None]] = {
    "forward": (forward, ((130, 577, 40, BFLOAT16), (130, 385, 40, BFLOAT16)), None),
    "forward of 128 columns": (
        forward,
        ((34, 577, 128, FLOAT16), (34, 385, 128, FLOAT16)),
        (FORWARD,),
    ),
    "forward of float32": (forward, ((34, 145, 40, FLOAT32),), (FORWARD,)),
    "row": (forward, ((130, 65, 40, BFLOAT16),), (ROWS,)),
    "backward": (backward, ((130, 257, 40, BFLOAT16), (194, 289, 40, BFLOAT16)), BACKWARD),
    "backward of 128 columns": (
        backward,
        ((66, 129, 128, FLOAT16), (130, 161, 128, FLOAT16)),
        BACKWARD,
    ),
    "backward of float32": (backward, ((34, 65, 40, FLOAT32),), BACKWARD),
    "masked backward": (
        backward,
        ((130, 577, 40, BFLOAT16, "mask"), (194, 385, 40, BFLOAT16, "mask")),
        BACKWARD,
    ),
    "percentile": (percentile, ((FLOAT32,),), None),
    "percentile of bfloat16": (percentile, ((BFLOAT16,),), None),
    "guidance": (guidance, ((1100,),), None),
    "staged guidance": (guidance, ((1100,),), None),
    "guidance by several programs": (guidance, ((9100,),), None),
}


@pytest.fixture
def tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of semantic guidance as longer ones are launched."""
    if name.startswith("staged"):
        monkeypatch.setattr(sega, "UNSTAGED", 0)
        monkeypatch.setattr(sega, "TILE", 256)
    if name.endswith("several programs"):
        monkeypatch.setattr(sega, "LONGEST", 0)
        monkeypatch.setattr(sega, "TILE", 256)
        monkeypatch.setattr(selection, "TILE", 256)
        monkeypatch.setattr(selection, "SPAN", 512)


LEAST = {  # of the table's sums, whatever becomes of the kernels
    "sm_80": {"barrier": 0.85, "copy wait": 1.0},
    "sm_90": {"barrier": 0.75, "copy wait": 1.0, "wgmma wait": 0.45, "wgmma fence": 0.5},
}
COLUMNS = ("barrier", "warp barrier", "copy wait", "wgmma wait", "wgmma fence", "proxy fence")
COLUMNS += ("copy wait weakened", "wgmma wait weakened", "guard")
# Of those that change what runs; a share a column. Without a row a call's shares are printed alone.
FOUND = {
    "sm_80": {
        "forward":    "35/43    2/2  6/6    -     -     -     6/6   -     31/56",
        "row":        "16/16    2/2  -      -     -     -     -     -     14/16",
        "percentile": "8/8      -    -      -     -     -     -     -     8/8",
    },
    "sm_90": {
        "forward":    "31/43    1/1  6/6    7/11  13/16 2/15  6/6   7/11  30/60",
        "row":        "7/7      2/2  -      2/8   5/8   1/8   -     2/8   14/16",
        "percentile": "8/8      -    -      -     -     -     -     -     8/8",
    },
}  # fmt: skip
SLACK = 0.05  # a kernel that changes a little has other mutants
SHORT = ("row", "percentile")  # the calls that continuous integration takes
COMPILER = "3.9."  # whose kernels the table is about


def shares(target: str, name: str) -> dict[str, str]:
    """A row of the table; none of a call that it lacks."""
    cells = FOUND[target].get(name, "").split()
    return dict(zip(COLUMNS, cells, strict=True)) if cells else {}


@pytest.mark.full
@pytest.mark.skipif(
    not triton.__version__.startswith(COMPILER), reason=f"the table is of Triton {COMPILER}"
)
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.long] * (x not in SHORT)) for x in CALLS]
)
def test_mutants(name: str, target: str, tiles: None) -> None:
    """The shares of the table are found; what changes nothing of a run does not count."""
    call, arguments, names = CALLS[name]
    seen, found, idle, missed = Counter(), Counter(), Counter(), []
    for kernel in kernels(lambda: [call(*one) for one in arguments], target):
        if names is not None and kernel.name not in names:
            continue
        kernel.check()
        for mutant in mutants(kernel.text):
            if kernel.finds(mutant):
                found[mutant.kind] += 1
            elif kernel.reaches(mutant):
                missed.append(f"  {mutant.kind}, {kernel.name}:{mutant.line}, {mutant.place}")
            else:
                idle[mutant.kind] += 1
                continue
            seen[mutant.kind] += 1
    cells = (f"{found[kind]}/{seen[kind]}" if seen[kind] else "-" for kind in COLUMNS)
    print(f"\n{target} | {name} | " + " | ".join(cells))
    print("\n".join([*missed, f"  idle: {dict(idle)}"]))
    for kind, cell in shares(target, name).items():
        if cell != "-" and seen[kind]:
            assert found[kind] / seen[kind] >= Fraction(cell) - SLACK, kind


@pytest.mark.parametrize("target", LEAST)
def test_shares(target: str) -> None:
    """The table's sums are not below their floors."""
    for kind, least in LEAST[target].items():
        cells = [shares(target, name)[kind] for name in FOUND[target]]
        pairs = [map(int, cell.split("/")) for cell in cells if cell != "-"]
        found, seen = map(sum, zip(*pairs))
        print(f"{target}, {kind}: {found}/{seen}")
        assert found / seen >= least, kind
