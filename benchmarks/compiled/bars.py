"""Bars of the compiled kernels, in the cycles of the model: ours beside plain attention under the
same tile, by the same compiler.

Not measured. Cycles are those of the busiest pipe, an untested tile's those that its instructions
take to issue. Loops over tiles alone count, the first of a backward kernel: as if nothing of a
program lay outside of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from dense_attn.triton_kernels.parts import next_power_of_2

from ..layout_attention.workloads import WORKLOADS
from .counts import SCORES
from .kernel_calls import PASSES, Attention
from .occupancy import DEVICES

Row = dict[str, Any]
HEAD_DIMS = (40, 64, 128)
SLACK = {"sm_80": 0.1, "sm_90": 0.0}
UNTESTED = {40: 1.05, 64: 1.05, 128: 1.0}
MIXED = 2.6
# Share of tiles of 128 x 64 with matched and unmatched pairs by the order of 64 x 64 image tokens,
# mean of 200 layouts of the DenseDiffusion benchmark; and the bar.
FORWARD = {"in region order": (0.06, 1.2), "in raster order": (0.91, 2.0)}
BACKWARD = 1.35
OLDEST = 1.1  # cycles by the oldest Triton, of those by this one
FEW_KEYS, FEW_KEYS_BAR = "sd15-cross-64", 2.5  # time of the row kernel, of that to copy its bytes
DIGITS = 3  # of what is shown; verdicts are of the numbers themselves
CLOCK, COPY = 1.83e9, 4.3e12  # a second, of sm_90; bytes a second that an H200 copies


def bars(rows: Iterable[Row]) -> list[Row]:
    """Each bar with its value, and whether it holds."""
    calls: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if _is_judged(row):
            kernel = row["kernel"].removeprefix("layout_attention_").removesuffix("_kernel")
            call = row["target"], row["triton"], row["head_dim"]
            calls.setdefault(call, {})[kernel.removeprefix("specialised_")] = row
    found = [
        dict(zip(("target", "triton", "head_dim"), call)) | bar
        for call, kernels in calls.items()
        for bar in (*_of_call(*call, kernels), *_by_the_oldest(call, kernels, calls))
    ]
    for bar in found:
        bar["verdict"] = "holds" if bar["value"] <= bar["bound"] else "missed"
        bar |= {name: round(bar[name], DIGITS) for name in ("value", "issued") if name in bar}
    return found


def said(found: Sequence[Row]) -> str:
    """How many bars hold, and each that does not."""
    missed = "{what} on {target} at {head_dim} columns by Triton {triton}, {value} of {bound}"
    each = [missed.format(**bar) for bar in found if bar["verdict"] != "holds"]
    held = f"{len(found) - len(each)} of {len(found)} bars of the model hold"
    return f"{held}; missed: {'; '.join(each) or 'none'}"


def _is_judged(row: Row) -> bool:
    """Whether a row is of a default call whose loops are counted."""
    if "plain" not in row or row["head_dim"] not in HEAD_DIMS or row["which"] not in PASSES:
        return False
    default = Attention(row["target"], row["which"], row["head_dim"])
    return all(row[name] == value for name, value in default.facts.items())


def _of_call(target: str, triton: str, head_dim: int, kernels: dict[str, Row]) -> Iterator[Row]:
    """Bars of one head dim by one compiler."""
    slack = SLACK[target]
    if "fwd" in kernels:
        (plain,) = kernels["fwd"]["plain"]["bodies"]
        # Loops over whole and mixed tiles take turns: a mixed tile passes through all of its own.
        bodies = kernels["fwd"]["bodies"]
        whole, mixed = bodies[0], bodies[1::2]
        yield _bar("untested tile", [(1, whole)], [plain], UNTESTED[head_dim] + slack, _issued)
        yield _bar("mixed tile", [(1, body) for body in mixed], [plain], MIXED + slack)
        for order, (share, bound) in FORWARD.items():
            tiles = [(1 - share, whole), *((share, body) for body in mixed)]
            yield _bar(f"forward {order}", tiles, [plain], bound + slack)
    if {"bwd_q", "bwd_kv"} <= kernels.keys():
        passes = kernels["bwd_q"], kernels["bwd_kv"]
        ours = [(1, row["bodies"][0]) for row in passes]
        plain = [row["plain"]["bodies"][0] for row in passes]
        yield _bar("backward", ours, plain, BACKWARD + slack)
    if "row_fwd" in kernels and target == "sm_90" and head_dim == 40:
        value = _few_keys(kernels["row_fwd"])
        yield {"what": f"{FEW_KEYS}, of its copy", "value": value, "bound": FEW_KEYS_BAR}


def _by_the_oldest(
    call: tuple[str, str, int], kernels: dict[str, Row], calls: dict[tuple, dict[str, Row]]
) -> Iterator[Row]:
    """Each kernel's loops by an older Triton, of those by the newest."""
    target, triton, head_dim = call
    newest = max((t for of, t, d in calls if (of, d) == (target, head_dim)), key=_version)
    if triton == newest:
        return
    for kernel, row in kernels.items():
        if kernel in (others := calls[target, newest, head_dim]):
            ours, theirs = (
                x["bodies"][:1] if kernel.startswith("bwd") else x["bodies"]
                for x in (row, others[kernel])
            )
            loops = [(1, body) for body in ours]
            yield _bar(f"{kernel}, of Triton {newest}'s", loops, theirs, OLDEST)


def _few_keys(row: Row) -> float:
    """Time of the row kernel's busiest pipe on all SMs, of that to copy its bytes."""
    workload = WORKLOADS[FEW_KEYS]
    rows = workload.batch * workload.num_heads * workload.seqlen_q
    keys = workload.batch * workload.num_heads * workload.seqlen_k
    # The cycles of a row are counted for the power of two that its keys are padded to.
    scores = rows * next_power_of_2(workload.seqlen_k)
    cycles = sum(map(_busiest, row["bodies"])) * scores / SCORES
    seconds = cycles / DEVICES[row["target"]].processors / CLOCK
    half_floats, statistics = 2 * (rows + keys) * workload.head_dim, 5 * rows
    return seconds / ((2 * half_floats + 4 * statistics) / COPY)


def _bar(
    what: str,
    ours: list[tuple[float, Row]],  # bodies, each with its share
    others: list[Row],
    bound: float,
    cycles: Callable[[Row], int] | None = None,
) -> Row:
    """Ours / others by the busiest pipe or as `cycles` says, and to issue."""

    def ratio(of: Callable[[Row], int]) -> float:
        return sum(share * of(body) for share, body in ours) / sum(map(of, others))

    value = ratio(cycles or _busiest)
    return {"what": what, "value": value, "bound": round(bound, 2), "issued": ratio(_issued)}


def _busiest(body: Row) -> int:
    return max(body["cycles"].values())


def _issued(body: Row) -> int:
    return body["cycles"]["issue"]


def _version(triton: str) -> tuple[int, ...]:
    return tuple(map(int, triton.split(".")[:2]))
