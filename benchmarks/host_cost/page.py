"""The tables of docs/measured.md, from results:
`python -m dense_attn.benchmarks.host_cost.page benchmarks/results/host-cost.json`, and those of
CUDA's ops from `host-cost-cuda.json` beside it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dense_attn import _command

from ..harness.measure import OURS, Row
from . import stubbed

CALLS = {  # what a reader calls each workload
    "host-attention": "`layout_attention`",
    "host-attention-record": "`layout_attention`, recorded for gradients",
    "host-attention-grad": "`layout_attention` and its gradients",
    "host-percentile": "`percentile_mask`",
    "host-ddim-step": "`ddim_step`",
    "host-sega-step": "a step of `SemanticGuidance`, two concepts",
    "host-exact-step": "a step of an exact EDICT chain",
    "host-layer": "a layer of a U-Net in `apply_layout`",
    "host-layer-guided": "the same layer with classifier-free guidance",
}


def tables(rows: list[Row]) -> str:
    """Calls beside what they are made of, then Triton's ops before their launches; rows without
    numbers are left out.
    """
    found = {(row["workload"], row["contender"]): row for row in rows if "seconds" in row}
    calls = ["| call | us | over its raw ops | over plain attention |", "|---|---|---|---|"]
    for name, text in CALLS.items():
        if row := found.get((name, OURS)):
            ratios = (
                f"{row[field]:.1f}x" if field in row else "-" for field in ("of_op", "of_sdpa")
            )
            calls.append(f"| {text} | {_us(row)} | {' | '.join(ratios)} |")
    ops = ["| Triton op | launches | us before them | us with the public op |", "|---|---|---|---|"]
    for name in stubbed.OPS:
        if row := found.get((name, stubbed.OP)):
            public = found.get((name, OURS))
            shown = _us(public) if public else "-"
            label = name.removeprefix("triton-")
            ops.append(f"| {label} | {row['launches']} | {_us(row)} | {shown} |")
    return "\n\n".join("\n".join(lines) for lines in (calls, ops) if len(lines) > 2)


def cuda_table(found: dict[str, Any]) -> str:
    """CUDA's ops before their launches, and with the public ops around them."""
    lines = ["| CUDA op | us before its launch | us with the public op |", "|---|---|---|"]
    for name, value in found["raw"].items():
        lines.append(f"| {name} | {value:.1f} | {found['public'].get(name, '-')} |")
    return "\n".join(lines)


def _us(row: Row) -> str:
    return f"{1e6 * row['seconds']:.0f}"


def main() -> int:
    """Print the tables of a file of results."""
    parser = argparse.ArgumentParser(f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument(
        "results", type=Path, help="what `bench --family host_cost` or `cuda.host_cost` wrote"
    )
    found = json.loads(parser.parse_args().results.read_text("utf-8"))
    print(tables(found["rows"]) if "rows" in found else cuda_table(found))
    return 0


if __name__ == "__main__":
    sys.exit(_command.run("page", main))
