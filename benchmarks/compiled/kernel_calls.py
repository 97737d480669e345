"""The calls whose kernels are compiled: every launch configuration, every branch of a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from dense_attn.triton_kernels import configs, layout_attention, reversible, sega
from dense_attn.triton_kernels.layout_attention.records import STATS
from dense_attn.triton_kernels.sega import selection

from .ahead_of_time import TARGETS

BATCH, HEADS = 2, 8
FEW = 256  # tokens whose half tiles are fewer than any target's processors
SHORT = 896  # tokens whose tiles are whole, and whose keys are not packed
HEAD_DIMS = dict.fromkeys(TARGETS, (40, 64)) | {"sm_90": (40, 64, 72, 80, 96, 128, 160, 192, 256)}
PASSES = ("fwd", "row_fwd", "bwd")
SPLIT, SPLIT_DIMS = "cross_bwd", (40, 64, 128)  # of so few keys that programs share the queries
empty = partial(torch.empty, device="meta")  # tensors of any size that take no memory: nothing runs


def precision_of(dtype: str, tf32: bool) -> str:
    """How products of a dtype are made, as `configs.precision` says it."""
    return "tf32" if tf32 else "ieee" if dtype == "float32" else "half"


@dataclass(frozen=True)
class Attention:
    """A layout attention call; its defaults are those that need the most registers."""

    target: str
    which: str  # of PASSES, or SPLIT
    head_dim: int
    dtype: str = "bfloat16"
    modulation: str = "range"
    layout: str = "[B,H,N,D]"  # the order of the axes in memory
    ordered: bool = True
    negative: bool = False  # the scale
    tf32: bool = False  # products of float32 that torch lets NVIDIA's round
    seqlen: int = 4096
    bare: bool = False  # no lse, no numbers for a gradient, one strength for all rows

    def __call__(self) -> None:
        """Launch the kernels of one pass."""
        seqlen_k = self.seqlen
        if self.which in ("row_fwd", SPLIT):
            seqlen_k = 77 if self.dtype != "float32" else 32
        q, k, v = self._rows(self.seqlen), self._rows(seqlen_k), self._rows(seqlen_k)
        words = empty(self.seqlen, dtype=torch.int32), empty(seqlen_k, dtype=torch.int32)
        numbers = empty(BATCH, HEADS, self.seqlen)
        narrow = nullcontext()
        if self.tf32:
            narrow = patch.object(configs, "precision", return_value="tf32")
        orders = words if self.ordered else (None, None)
        last = (self.modulation, -1.0 if self.negative else 1.0, *orders)
        tensors = q, k, v, *words, None if self.bare else numbers
        with narrow:
            if self.which in ("bwd", SPLIT):
                stats = empty(*q.shape[:3], STATS)
                layout_attention.layout_attention_bwd(q, numbers, *tensors, q, stats, *last)
            else:
                asked = {"with_lse": not self.bare, "with_stats": not self.bare}
                layout_attention.layout_attention_fwd(*tensors, *last, *_lists(q, k), **asked)

    def _rows(self, seqlen: int) -> Tensor:
        shape = (BATCH, HEADS, seqlen, self.head_dim)
        if self.layout == "[B,N,H,D]":
            shape = (BATCH, seqlen, HEADS, self.head_dim)
        rows = empty(shape, dtype=getattr(torch, self.dtype))
        return rows.transpose(1, 2) if self.layout == "[B,N,H,D]" else rows

    @property
    def precision(self) -> str:
        """How its products are made."""
        return precision_of(self.dtype, self.tf32)

    @property
    def facts(self) -> dict[str, object]:
        """The call as a row of the table has it."""
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
        """The call as a row of the table has it."""
        return asdict(self)


def _lists(q: Tensor, k: Tensor) -> tuple[Tensor, ...]:
    """Tile lists as made beforehand, so that a forward call launches one kernel."""
    blocks = layout_attention.fwd_blocks(q, k)
    if blocks is None:
        return ()
    query_tiles, key_tiles = (-(-x.shape[2] // block) for x, block in zip((q, k), blocks))
    shapes = (1, query_tiles, 2, key_tiles), (1, query_tiles, 3), (1, k.shape[2])
    return tuple(empty(shape, dtype=torch.int32) for shape in shapes)


def _tile_lists() -> None:
    """Tile lists of one layout for all samples, and of one a sample in an order of its own."""
    one, each = empty(4096, dtype=torch.int32), empty(BATCH, 4095, dtype=torch.int32)
    layout_attention.tile_lists(one, one, None, None, 128, 64)
    layout_attention.tile_lists(each, each, each, each, 64, 32)


def _guide(
    num_values: int,
    sum_channels: bool = False,
    dtype: torch.dtype = torch.float32,
    apart: bool = False,
) -> None:
    """A step of three concepts; apart: a pixel's channels, not a channel's pixels, lie together."""
    uncond = empty((1, 4, num_values), dtype=dtype)
    edits = empty((3, 1, 4, num_values), dtype=dtype)
    if apart:
        uncond, edits = (x.mT.contiguous().mT for x in (uncond, edits))
    lists = {
        "edit_guidance_scale": [5.0] * 3,
        "edit_threshold": [0.9] * 3,
        "weights": [1.0] * 3,
        "partials": [0.0] * 3,
        "reverse": [False] * 3,
    }
    numbers = {
        "guidance_scale": 7.5,
        "edit_momentum_scale": 0.3,
        "edit_mom_beta": 0.4,
        "all_warm": True,
        "sum_channels": sum_channels,
    }
    sega.sega_guidance(uncond, uncond, edits, uncond.float(), **lists, **numbers, user_mask=None)


def _sega() -> None:
    """Channels and rows that one program holds."""
    _guide(4096)
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


OTHERS = {
    "tile_lists": _tile_lists,
    "sega": _sega,
    "sega_long": _sega_long,
    "reversible": _reversible,
}
BRANCHES = (  # each branch of every kernel that the defaults do not take
    {"dtype": "float16", "modulation": "mask", "ordered": False, "seqlen": 4095},
    {"dtype": "bfloat16", "modulation": "bias", "negative": True, "layout": "[B,N,H,D]"},
    {"dtype": "float32", "modulation": "max"},
    {"dtype": "float16", "modulation": "mask", "seqlen": 1},  # a size of 1 is a constant
    {"dtype": "float16", "head_dim": 100},  # rows that are not aligned
    {"bare": True},
    {"bare": True, "modulation": "mask"},
)


def tables() -> dict[tuple[str, str, str], dict[int, configs.Config]]:
    """The tables of `configs` by kernel, target and precision, each by largest head dim."""
    by_kernel = {"fwd": configs.FORWARD, "row_fwd": configs.ROW_FORWARD}
    by_kernel |= {"bwd_q": configs.BACKWARD_Q, "bwd_kv": configs.BACKWARD_KV}
    found = {}
    for target, rows in configs.SPECIALISED.items():
        found["specialised_fwd", target, "half"] = rows
    for target in TARGETS:
        for kernel, by_target in by_kernel.items():
            exact = {"bwd_q": configs.FLOAT32_BACKWARD_Q, "bwd_kv": configs.FLOAT32_BACKWARD}
            exact = exact.get(kernel, configs.FLOAT32)
            found[kernel, target, "half"] = by_target[target]
            found[kernel, target, "ieee"] = exact[target]
        if target in configs.TF32_FORWARD:
            found["fwd", target, "tf32"] = configs.TF32_FORWARD[target]
            found["row_fwd", target, "tf32"] = configs.FLOAT32[target]
            found["bwd_q", target, "tf32"] = configs.TF32_BACKWARD_Q[target]
            found["bwd_kv", target, "tf32"] = configs.TF32_BACKWARD_KV[target]
    return found


def half_of(kernel: str, config: configs.Config) -> configs.Config:
    """A kernel's configuration where whole tiles leave processors idle."""
    return configs.filling(config, 1, 1, 2, "BLOCK_N" if kernel == "bwd_kv" else "BLOCK_M")


def each_configuration() -> Iterator[Attention | Other]:
    """Calls that reach every row of `configs` on every target at its largest head dim."""
    kinds = {"half": {}, "ieee": {"dtype": "float32"}, "tf32": {"dtype": "float32", "tf32": True}}
    for (kernel, target, precision), rows in tables().items():
        which = kernel.removesuffix("_q").removesuffix("_kv").removeprefix("specialised_")
        yield from (Attention(target, which, d, **kinds[precision]) for d in rows)
        if kernel.startswith("specialised"):
            yield from (Attention(target, which, d, seqlen=SHORT) for d in rows)
        few = kinds[precision] | {"seqlen": FEW}
        halved = (d for d, config in rows.items() if half_of(kernel, config) != config)
        yield from (Attention(target, which, d, **few) for d in halved)
    yield from each_other()


def each_other() -> Iterator[Other]:
    """The calls of the other families."""
    yield from (Other(target, which) for target in TARGETS for which in OTHERS)


def each_branch(target: str) -> Iterator[Attention]:
    """Calls that together take every branch of the layout attention kernels."""
    for branch in BRANCHES:
        passes = PASSES if not branch.get("bare") else PASSES[:2]
        yield from (Attention(target, which, **({"head_dim": 64} | branch)) for which in passes)
        if target in configs.SPECIALISED:  # other tiles of specialised warps; and heads without
            yield from (Attention(target, "fwd", **({"head_dim": d} | branch)) for d in (128, 96))


def is_left_out(call: Attention | Other) -> bool:
    """Whether this Triton is spared a call: the newer one takes a minute for gfx942's row kernel,
    which is left to 3.6 and its seconds, and 3.6 cannot compile gfx942's forward kernel.
    """
    newer = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)
    if (call.target, call.which) == ("gfx942", "row_fwd"):
        return newer and call.dtype != "float32"
    return (call.target, call.which, newer) == ("gfx942", "fwd", False)


def configurations() -> list[Attention | Other]:
    """Every configuration, on one target every branch and the smallest head dim, and that of the
    row kernel on all, whose tables can have no row of a common head dim.
    """
    smallest = [Attention("sm_90", which, 40) for which in PASSES]
    smallest += [Attention(target, "row_fwd", 40) for target in TARGETS]
    smallest.append(Attention("sm_90", "row_fwd", 40, bare=True))
    smallest.append(Attention("sm_90", "fwd", 40, seqlen=SHORT))
    split = [Attention(target, SPLIT, d) for target in TARGETS for d in SPLIT_DIMS]
    calls = dict.fromkeys([*each_configuration(), *each_branch("sm_90"), *smallest, *split])
    return [call for call in calls if not is_left_out(call)]


def tested() -> list[Attention | Other]:
    """The configurations that the tests compile: on sm_90 all, elsewhere the common ones."""
    return [call for call in configurations() if call.target == "sm_90" or _is_common(call)]


def everything() -> list[Attention | Other]:
    """The table's calls: more head dims, and branches and orders of memory on all targets."""
    calls = dict.fromkeys([*configurations(), *each_configuration()])
    for target in TARGETS:
        dims = HEAD_DIMS[target]
        more = [Attention(target, which, head_dim) for which in PASSES for head_dim in dims]
        more += [Attention(target, which, 40, layout="[B,N,H,D]") for which in PASSES]
        more += each_branch(target)
        calls |= dict.fromkeys(call for call in more if not is_left_out(call))
    return list(calls)


def few() -> list[Attention | Other]:
    """The calls that the tests compile with the oldest Triton: the common ones."""
    return [call for call in configurations() if _is_common(call)]


def _is_common(call: Attention | Other) -> bool:
    """Whether the oldest Triton compiles a call too: other families, plain attention up to head dim
    128, and float32's of a kernel that is too slow for those.
    """
    if isinstance(call, Other) or (call.target, call.which) == ("gfx942", "row_fwd"):
        return True
    if call.which == SPLIT:
        return False
    plain = Attention(call.target, call.which, call.head_dim, seqlen=call.seqlen, bare=call.bare)
    return call == plain and call.head_dim <= 128 and call.seqlen > FEW


CALLS = {"everything": everything, "configurations": configurations, "tested": tested, "few": few}
