"""The calls whose kernels are compiled ahead of time: every launch configuration, and every branch of every kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor

from dense_attn.triton_kernels import configs, layout_attention, reversible, sega, selection

from .ahead_of_time import TARGETS

BATCH, HEADS = 2, 8
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160, 192, 256)
PASSES = ("fwd", "row_fwd", "bwd")
empty = partial(torch.empty, device="meta")  # tensors of any size that take no memory: nothing runs


@dataclass(frozen=True)
class Attention:
    """A layout attention call; its defaults are those that need the most registers."""

    target: str
    which: str  # of PASSES
    head_dim: int
    dtype: str = "bfloat16"
    modulation: str = "range"
    layout: str = "[B,H,N,D]"  # the order of the axes in memory
    ordered: bool = True
    negative: bool = False  # the scale
    tf32: bool = False
    seqlen: int = 4096

    def __call__(self) -> None:
        """Launch the kernels of one pass."""
        seqlen_k = self.seqlen if self.which != "row_fwd" else 77 if self.dtype != "float32" else 32
        q, k, v = self._rows(self.seqlen), self._rows(seqlen_k), self._rows(seqlen_k)
        words = empty(self.seqlen, dtype=torch.int32), empty(seqlen_k, dtype=torch.int32)
        numbers = empty(BATCH, HEADS, self.seqlen)
        narrow = patch.object(configs, "precision", return_value="tf32") if self.tf32 else nullcontext()
        last = (self.modulation, -1.0 if self.negative else 1.0, *(words if self.ordered else ()))
        with narrow:
            if self.which == "bwd":
                stats = empty(*q.shape[:3], layout_attention.STATS)
                layout_attention.layout_attention_bwd(q, numbers, q, k, v, *words, numbers, q, stats, *last)
            else:
                layout_attention.layout_attention_fwd(q, k, v, *words, numbers, *last)

    def _rows(self, seqlen: int) -> Tensor:
        shape = (BATCH, HEADS, seqlen, self.head_dim)
        if self.layout == "[B,N,H,D]":
            shape = (BATCH, seqlen, HEADS, self.head_dim)
        rows = empty(shape, dtype=getattr(torch, self.dtype))
        return rows.transpose(1, 2) if self.layout == "[B,N,H,D]" else rows

    @property
    def facts(self) -> dict[str, object]:
        """What a row of the table says of its call."""
        return asdict(self)


@dataclass(frozen=True)
class Other:
    """The calls of another family."""

    target: str
    which: str  # of OTHERS

    def __call__(self) -> None:
        """Launch its kernels."""
        OTHERS[self.which]()

    @property
    def facts(self) -> dict[str, object]:
        """What a row of the table says of its call."""
        return asdict(self)


def _guide(
    num_values: int, sum_channels: bool = False, dtype: torch.dtype = torch.float32, apart: bool = False
) -> None:
    """A step of three concepts; apart: the channels of a pixel are neighbours, the pixels of a channel are not."""
    uncond, edits = empty((1, 4, num_values), dtype=dtype), empty((3, 1, 4, num_values), dtype=dtype)
    if apart:
        uncond, edits = (x.mT.contiguous().mT for x in (uncond, edits))
    lists = {"edit_guidance_scale": [5.0] * 3, "edit_threshold": [0.9] * 3, "edit_weights": [1.0] * 3}
    lists |= {"warm": [True] * 3, "enabled": [True] * 3, "reverse": [False] * 3}
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.3, "edit_mom_beta": 0.4, "sum_channels": sum_channels}
    sega.sega_guidance(uncond, uncond, edits, uncond.float(), **lists, **numbers, user_mask=None)


def _sega() -> None:
    """Channels and rows that one program holds."""
    for longest in (sega.UNSTAGED, selection.LONGEST):
        _guide(longest)
        _guide(longest // 2, sum_channels=True)
        _guide(longest // 2, apart=True)
        _guide(longest // 4, sum_channels=True, apart=True)
        _guide(longest, dtype=torch.bfloat16)
    sega.percentile_mask(empty(4, selection.LONGEST), 0.9)
    sega.percentile_mask(empty(4, selection.LONGEST, dtype=torch.bfloat16), 0.9)


def _sega_long() -> None:
    """Channels and rows that several programs share."""
    _guide(2 * selection.LONGEST)
    sega.percentile_mask(empty(4, 2 * selection.LONGEST), 0.9)


def _reversible() -> None:
    x, z = empty(4096), empty(4096, dtype=torch.int64)
    reversible.ddim_step(x, x.half(), x.half(), 0.9, 0.3, 7.5)
    reversible.leapfrog_step(x, x, x, 0.9, 0.3, 7.5)
    reversible.edict_mix(x, x, x, 0.9, 0.3, 0.93, True)
    reversible.edict_unmix(x, x, x, 0.9, 0.3, 0.93, True)
    reversible.exact_couple(z, x, 0.9, 0.3, torch.float16)
    reversible.exact_leapfrog(z, z, x, 0.9, 0.3, 0.1, torch.bfloat16)
    reversible.exact_mix(z, z, x, 0.9, 0.93, True, 0.1, False, torch.float32)
    reversible.exact_unmix(z, z, x, 0.9, 0.93, False, 0.1, True, torch.float32)


OTHERS = {"sega": _sega, "sega_long": _sega_long, "reversible": _reversible}
BRANCHES = (  # each branch of every kernel that the defaults do not take
    {"dtype": "float16", "modulation": "mask", "ordered": False, "seqlen": 4095},
    {"dtype": "bfloat16", "modulation": "bias", "negative": True, "layout": "[B,N,H,D]"},
    {"dtype": "float32", "modulation": "max", "tf32": True},
)


def each_configuration() -> Iterator[Attention | Other]:
    """Calls that reach every row of `configs` at its largest head dim."""
    tables = {"fwd": (configs.FORWARD,), "row_fwd": (configs.ROW_FORWARD,)}
    tables["bwd"] = (configs.BACKWARD_Q, configs.BACKWARD_KV)
    for target in TARGETS:
        for which in PASSES:
            largest = set().union(*(table[target] for table in tables[which]))
            yield from (Attention(target, which, head_dim) for head_dim in sorted(largest))
        yield from (Other(target, which) for which in OTHERS)
    for which in PASSES:  # these rows are of no architecture: they are to fit the one with the least shared memory
        yield from (Attention("gfx942", which, head_dim, "float32") for head_dim in configs.FLOAT32)


def each_branch(target: str) -> Iterator[Attention]:
    """Calls that together take every branch of the layout attention kernels."""
    for branch in BRANCHES:
        yield from (Attention(target, which, 64, **branch) for which in PASSES)


def tested() -> list[Attention | Other]:
    """What the tests compile: every configuration, every branch on one target, the smallest head dim on all."""
    return [
        *each_configuration(), *each_branch("sm_90"), *(Attention(target, "fwd", 40) for target in TARGETS)
    ]  # fmt: skip


def everything() -> list[Attention | Other]:
    """What the table lists: all head dims, branches and orders of memory on all targets."""
    calls = dict.fromkeys(tested())
    for target in TARGETS:
        for which in PASSES:
            calls |= dict.fromkeys(Attention(target, which, head_dim) for head_dim in HEAD_DIMS)
            calls |= dict.fromkeys(Attention(target, which, head_dim, "float32") for head_dim in configs.FLOAT32)
            calls[Attention(target, which, 40, layout="[B,N,H,D]")] = None
        calls |= dict.fromkeys(each_branch(target))
    return list(calls)
