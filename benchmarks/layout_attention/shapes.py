"""Shapes of the user's own as workloads: `--shape`, with `--modulation` and `--regions`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt

from dense_attn.layout_attention.layout import MAX_REGIONS
from dense_attn.layout_attention.op import MODULATIONS

from ..harness import machine
from . import workloads
from .workloads import Workload

DTYPES = ("float32", "bfloat16", "float16")
_LONGEST = 2**31 - 1


def register(shapes: Sequence[str], modulation: str | None, regions: str | None) -> list[str]:
    """Make workloads of shapes; their names."""
    own = parse(shapes, modulation, regions)
    workloads.WORKLOADS.update(own)
    return list(own)


def parse(
    shapes: Sequence[str], modulation: str | None, regions: str | None
) -> dict[str, Workload]:
    """The workloads of shapes, by name, each once, with all dtypes it is asked for in.

    Raises:
        ValueError: an option breaks its rule, which the message says.
    """
    if not shapes and (modulation or regions):
        option = "--modulation" if modulation else "--regions"
        raise ValueError(f"{option} must stand beside --shape, got no --shape")
    if modulation not in (None, *MODULATIONS):
        known = ", ".join(MODULATIONS)
        raise ValueError(f"--modulation must be one of {known}, got {modulation!r}")
    if regions is not None and not (regions.isdecimal() and 1 <= int(regions) <= MAX_REGIONS):
        rule = f"be a whole number from 1 to {MAX_REGIONS}"
        raise ValueError(f"--regions must {rule}, got {regions!r}")
    own: dict[str, Workload] = {}
    how = {"modulation": modulation or "range", "stripes": int(regions or 0)}
    for text in shapes:
        workload = replace(_workload(text), **how)
        _check_regions(workload, text)
        known = own.get(workload.name, workload).dtypes
        own[workload.name] = replace(workload, dtypes=tuple(dict.fromkeys(known + workload.dtypes)))
    return own


def _workload(text: str) -> Workload:
    *sizes, last = words = [word.strip() for word in text.split(",")]
    sizes, dtypes = (words, _usual_dtypes()) if len(words) == 5 else (sizes, (last,))
    whole = all(size.isdecimal() and 1 <= int(size) <= _LONGEST for size in sizes)
    if len(sizes) != 5 or not whole:
        rule = f"be B,H,M,N,D[,dtype] of whole numbers from 1 to {_LONGEST}"
        raise ValueError(f"--shape must {rule}, got {text!r}")
    if len(words) == 6 and last not in DTYPES:
        raise ValueError(f"--shape must name a dtype of {', '.join(DTYPES)}, got {text!r}")
    batch, num_heads, seqlen_q, seqlen_k, head_dim = map(int, sizes)
    kind = "self" if seqlen_q == seqlen_k else "cross"
    prompt = {"text_tokens": seqlen_k} if kind == "cross" else {}
    return Workload(
        ",".join(str(int(size)) for size in sizes),
        kind,
        num_heads,
        _grid(seqlen_q),
        head_dim,
        batch,
        flex=True,
        dtypes=dtypes,
        **prompt,
    )


def _usual_dtypes() -> tuple[str, ...]:
    return ("bfloat16", "float16") if machine.on_gpu() else ("float32", "bfloat16")


def _grid(tokens: int) -> tuple[int, int]:
    """The most square (height, width) of so many image tokens."""
    height = next(height for height in range(isqrt(tokens), 0, -1) if tokens % height == 0)
    return height, tokens // height


def _check_regions(workload: Workload, text: str) -> None:
    """Refuse a layout with a region that has no queries, or no keys."""
    height, width = workload.grid
    if workload.stripes > width:
        grid = f"{width}, the columns of the {height} x {width} grid of --shape {text}"
        raise ValueError(f"--regions must be at most {grid}, got {workload.stripes}")
    least = workload.stripes or len(workloads.label_layout()[1])
    if workload.kind == "cross" and workload.seqlen_k < least:
        raise ValueError(f"--shape must have a key for each of {least} regions, got {text!r}")
