"""The cost of layouts and of prompts of regions in a block of each family:
`python -m dense_attn.benchmarks.blocks.run --json FILE`.

A block as wide as a real model's runs in several ways (`ways.py`) that take turns, on one image
without guidance, of as many tokens as U-Nets have at 512 and at 1,024 pixels, and as joint
attention has at 512 (`--side 64`: 1,024), which takes seconds a call. FLUX and Qwen-Image have
rows at 1,024 pixels too, in float32 and of a round less: what regions cost depends on how many
tokens their texts add to the image's, and with `--dtype bfloat16` as much on which attention the
processor has an instruction for. Ratios are medians over rounds; memory is what a call adds beyond
what the plain one adds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from dense_attn import _command, _files, _memory

from ..harness.header import describe_run
from .networks import NETWORKS
from .page import table
from .ways import COUPLE, DENSE, Call, Ways

DTYPES = ("float32", "bfloat16")
BARS = {"layout": 1.1, "regions": 1.15}  # of the plain block's time
MOST_BYTES = 32 * 10**6  # beyond the plain block's
_ALLOWED = {"float32": 1e-4, "bfloat16": 2e-2}  # between regions and attention couple
Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and the bars, write; 1 if a result is wrong."""
    parser = argparse.ArgumentParser(f"python -m {__spec__.name}", description="Cost of a layout.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results")
    parser.add_argument("--rounds", type=int, default=3, help="calls of each way (3)")
    parser.add_argument("--side", type=int, default=32, help="of joint images, in tokens (32)")
    parser.add_argument("--network", action="append", choices=NETWORKS, help="may be repeated")
    parser.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated")
    parser.add_argument("--dry-run", action="store_true", help="small blocks: times mean nothing")
    arguments = parser.parse_args(argv)
    if arguments.json is not None:
        _files.check(arguments.json)
    start, rows = time.perf_counter(), []
    for name in arguments.network or NETWORKS:
        real = NETWORKS[name].real
        for dtype in arguments.dtype or (DTYPES[:1] if real else DTYPES):
            rounds = max(1, arguments.rounds - real)
            rows += measure(name, dtype, arguments.side, rounds, arguments.dry_run)
            print(table(rows[-len(ways_of(name)) :]), flush=True)
    found = {"bars": bars(rows), "rows": rows}
    for bar in found["bars"]:
        print(*bar.values())
    if arguments.json is not None:
        header = describe_run(quick=False) | {"dry_run": arguments.dry_run, "regions": "3 stripes"}
        header["seconds"] = round(time.perf_counter() - start, 1)
        _files.write(arguments.json, json.dumps({"header": header, **found}, indent=1) + "\n")
    return int(any("wrong" in row for row in rows))


def ways_of(name: str) -> list[str]:
    """The ways that a network's block runs in; the first is what the others are compared with."""
    by_hand = DENSE if NETWORKS[name].joint else COUPLE
    return ["plain", "layout", "regions"] + ([] if NETWORKS[name].real else [by_hand])


@torch.no_grad()
def measure(name: str, dtype: str, side: int, rounds: int, dry: bool) -> list[Row]:
    """A row of each way."""
    network, rows, calls = NETWORKS[name], [], {}
    torch.manual_seed(0)
    pipe = network.make(dry)
    pipe.set_progress_bar_config(disable=True)
    logging.set_verbosity_error()  # no words about parts that are to stay in float32: none does
    pipe.to(getattr(torch, dtype))
    with ExitStack() as stack:
        ways = Ways(network, pipe, side if dry else network.side or side, stack)
        for way in ways_of(name):
            rows.append({"family": "blocks", "workload": name, "contender": way, "dtype": dtype})
            try:
                calls[way] = ways.call(way)
            except ValueError as error:
                rows[-1]["reason"] = str(error)
        found = _found(calls, rounds, warm=network.real)
    for row in rows:
        row |= found.get(row["contender"], {})
        if COUPLE in calls and row["contender"] == "regions":
            row["allowed"] = _ALLOWED[dtype]
            row |= {} if row["error"] <= row["allowed"] else {"wrong": True}
    return rows


def _found(calls: dict[str, Call], rounds: int, warm: bool) -> dict[str, Row]:
    """Numbers of each way, the first of which is plain; `warm`: what is made once is there."""
    bytes_of, results, times = {}, {}, {way: [] for way in calls}
    for way, call in calls.items():
        if not warm:
            call()  # what is made once
        bytes_of[way], results[way] = _memory.peak_extra_bytes(call)
    for _ in range(rounds):
        for way, call in calls.items():
            start = time.perf_counter()
            call()
            times[way].append(time.perf_counter() - start)
    found = {}
    for way in calls:
        known = None not in (bytes_of[way], bytes_of["plain"])
        ratios = [mine / plain for mine, plain in zip(times[way], times["plain"])]
        found[way] = {
            "seconds": statistics.median(times[way]),
            "of_plain": statistics.median(ratios),
            "extra_bytes": max(0, bytes_of[way] - bytes_of["plain"]) if known else None,
        }
    if COUPLE in calls and "regions" in calls:
        ours, theirs = (results[way].double() for way in ("regions", COUPLE))
        found["regions"]["error"] = float((ours - theirs).abs().max() / theirs.abs().max())
    return found


def bars(rows: list[Row]) -> list[Row]:
    """Verdicts on the time and memory of each row that has a bar."""
    verdicts = []
    for row in rows:
        bound = BARS.get(row["contender"])
        measured = {"of_plain": bound, "extra_bytes": MOST_BYTES}
        for field, most in measured.items() if bound else ():
            value = row.get(field)
            kept = "not measured" if value is None else "pass" if value <= most else "miss"
            named = {key: row[key] for key in ("workload", "dtype", "contender")}
            what = {"what": field, "bound": most, "measured": value, "verdict": kept}
            verdicts.append(named | what)
    return verdicts


if __name__ == "__main__":
    raise SystemExit(_command.run("blocks", main))
