"""The table of docs/measured.md: `python -m dense_attn.benchmarks.compiled.page FILE`, of
`benchmarks/results/kernels.json`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from dense_attn import _command

from .kernel_calls import Attention
from .kernel_table import Row, read

TARGET, HEAD_DIMS = "sm_90", (40, 64, 80, 128, 256)
KERNELS = {  # what a reader calls each
    "fwd": "forward",
    "row_fwd": "forward, few keys",
    "bwd_q": "backward, over queries",
    "bwd_kv": "backward, over keys",
}


def table(rows: Iterable[Row], triton: str) -> str:
    """Registers a thread / spilled bytes, and matrix instructions, of the default calls."""
    cells = {
        (row["head_dim"], kernel): _cell(row)
        for row in rows
        for kernel in KERNELS
        if row["triton"] == triton and _is(row, kernel)
    }
    lines = [["head dim", *KERNELS.values()], ["---"] * (1 + len(KERNELS))]
    lines += [[str(d), *(cells[d, kernel] for kernel in KERNELS)] for d in HEAD_DIMS]
    return "\n".join(f"| {' | '.join(line)} |".replace(" --- ", "---") for line in lines)


def _is(row: Row, kernel: str) -> bool:
    """Whether a row is of the kernel in a default call, by specialised warps where they take it."""
    names = [f"layout_attention_{kind}{kernel}_kernel" for kind in ("", "specialised_")]
    which = kernel.removesuffix("_q").removesuffix("_kv")
    if row["kernel"] not in names or row["head_dim"] not in HEAD_DIMS:
        return False
    default = Attention(TARGET, which, row["head_dim"])
    return all(row[name] == value for name, value in default.facts.items())


def _cell(row: Row) -> str:
    return f"{row['registers']} / {row['spills']}, {sum(row['matrix'].values())}"


def main() -> int:
    """Print the table of a file of kernels."""
    parser = argparse.ArgumentParser(f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("kernels", type=Path, help="what `kernel_table --json` wrote")
    found = read(parser.parse_args().kernels)
    print(table(found["rows"], found["header"]["versions"]["triton"]))
    return 0


if __name__ == "__main__":
    sys.exit(_command.run("page", main))
