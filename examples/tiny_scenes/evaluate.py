"""Does it work? `python -m dense_attn.examples.tiny_scenes.evaluate --json FILE`, or only a part of
it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dense_attn import _command, _files
from dense_attn.benchmarks.harness.header import describe_run

from . import chains, edits, layouts, sheet
from .model import load_pipeline
from .score import GUIDANCE, STEPS

QUICK = {"count": 4, "seeds": 1}
PARTS: dict[str, Callable[[Any, bool, int], dict[str, Any]]] = {
    "gate": lambda pipe, quick, _: layouts.gate(pipe, 4 if quick else 200),
    "layouts": lambda pipe, quick, seeds: layouts.study(
        pipe, **(QUICK if quick else {"seeds": seeds})
    ),
    "similar": lambda pipe, quick, seeds: layouts.study(
        pipe, **(QUICK if quick else {"count": 60, "seeds": seeds}), similar=True
    ),
    "same": lambda pipe, quick, _: {
        "layouts": layouts.same_tables(pipe, 2 if quick else 200),
        "edits": edits.same_tables(pipe, 2 if quick else 24),
        "optimisation": chains.same_tables(pipe, 2 if quick else 7, 2 if quick else 10),
    },
    "edits": lambda pipe, quick, _: edits.study(pipe, 2 if quick else 24),
    "inversion": lambda pipe, quick, _: chains.inversion(
        pipe, 1 if quick else 8, (4,) if quick else (25, 50, 100, 200)
    ),
    "optimisation": lambda pipe, quick, _: chains.optimisation(
        pipe, 2 if quick else 14, 2 if quick else 10
    ),
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts, add them to the file, print the tables of all that is in it."""
    parser = argparse.ArgumentParser(
        "python -m dense_attn.examples.tiny_scenes.evaluate", description=__doc__
    )
    parser.add_argument(
        "--only", action="append", choices=PARTS, default=[], help="this part; may be repeated"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path("tiny_scenes.json"),
        help="results, added to (%(default)s)",
    )
    parser.add_argument(
        "--weights", type=Path, help="of train.py (default: those that are shipped)"
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="noises of a layout (%(default)s; --quick: 1)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a few of everything: numbers mean nothing"
    )
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    pictures = (
        arguments.json.with_name(f"{arguments.json.stem}-edits.png"),
        arguments.json.with_suffix(".png"),
    )
    for file in (arguments.json, *pictures):
        _files.check(file)
    pipe = load_pipeline(arguments.weights)
    results = (
        json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.exists() else {}
    )
    parts = arguments.only or list(PARTS)
    for name in parts:
        results[name] = PARTS[name](pipe, arguments.quick, arguments.seeds)
        run = {
            "steps": STEPS,
            "guidance": GUIDANCE,
            "quick": arguments.quick,
            "threads": torch.get_num_threads(),
        }
        results["header"] = header = (
            describe_run(quick=arguments.quick) | run | {"regions": "drawn scenes"}
        )
        results[name]["run"] = {
            key: header[key] for key in ("date", "git_revision", "device", "threads", "quick")
        }
        _files.write(arguments.json, json.dumps(results, indent=1) + "\n")
    if "edits" in parts:
        edits.plot(results["edits"], pictures[0])
    if "layouts" in parts:
        rows = sheet.shipped_rows()
        sheet.draw(rows, sheet.make(rows, pipe), pictures[1])
    print("\n\n".join(tables(results)))
    return 0


def tables(results: dict[str, Any]) -> list[str]:
    """What was found, as text."""
    shown = []
    if "gate" in results:
        gate = results["gate"]
        line = ", ".join(f"{name} {gate[name]:.3f}" for name in layouts.GATE)
        shown.append(f"held-out prompts of two things, no layout, {gate['prompts']} images: {line}")
    for name in ("layouts", "similar"):
        if name in results:
            shown.append(layouts.table(results[name]))
    if "same" in results:
        shown.append("kernels and reference, largest differences")
        for name in ("layouts", "edits", "optimisation"):
            found = results["same"][name]
            shown[-1] += "".join(
                f"\n{name}, {key}: {found[key]:.1e}" for key in found if key.startswith("of ")
            )
    if "edits" in results:
        shown += [edits.table(results["edits"]), edits.curves(results["edits"])]
    if "inversion" in results:
        shown.append(chains.inversion_table(results["inversion"]))
    if "optimisation" in results:
        shown.append(chains.optimisation_table(results["optimisation"]))
    return shown


if __name__ == "__main__":
    raise SystemExit(_command.run("evaluate", main))
