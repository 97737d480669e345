"""The table of docs/diffusers.md, from results:
`python -m dense_attn.benchmarks.blocks.page benchmarks/results/blocks-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from dense_attn import _command

HEADS = ("block", "dtype", "way", "seconds", "of plain", "extra MB")


def table(rows: list[dict[str, Any]]) -> str:
    """The ways of each block beside each other; a reason where there are no numbers."""
    lines = [f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|"]
    for row in rows:
        cells = [row["workload"], row["dtype"], row["contender"]]
        if "seconds" in row:
            extra = row["extra_bytes"]
            megabytes = "-" if extra is None else f"{extra / 1e6:.0f}"
            cells += [f"{row['seconds']:.3f}", f"{row['of_plain']:.2f}x", megabytes]
        else:
            cells += [f"not measured: {row['reason']}", "-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    """Print the table of a file of results."""
    parser = argparse.ArgumentParser(f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("results", type=Path, help="what `benchmarks.blocks.run --json` wrote")
    print(table(json.loads(parser.parse_args().results.read_text("utf-8"))["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(_command.run("page", main))
