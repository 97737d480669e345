"""Does it work? `python -m dense_attn.examples.tiny_scenes.evaluate --json FILE`, or only a part of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dense_attn.benchmarks.header import describe_run

from . import chains, edits, layouts
from .model import load_pipeline
from .score import GUIDANCE, STEPS

QUICK = {"count": 4, "seeds": 1}
PARTS: dict[str, Callable[[Any, bool], Any]] = {
    "gate": lambda pipe, quick: layouts.gate(pipe, 4 if quick else 200),
    "layouts": lambda pipe, quick: layouts.study(pipe, **(QUICK if quick else {})),
    "similar": lambda pipe, quick: layouts.study(pipe, similar=True, **(QUICK if quick else {"count": 40})),
    "same": lambda pipe, quick: layouts.same_tables(pipe, 2 if quick else 20),
    "edits": lambda pipe, quick: edits.study(pipe, 1 if quick else 10),
    "inversion": lambda pipe, quick: chains.inversion(pipe, 1 if quick else 4, (4,) if quick else (25, 50, 100, 200)),
    "optimisation": lambda pipe, quick: chains.optimisation(pipe, 1 if quick else 3, 2 if quick else 8),
}


def main(argv: list[str] | None = None) -> int:
    """Run the parts, add them to the file, print the tables of all that is in it."""
    parser = argparse.ArgumentParser("python -m dense_attn.examples.tiny_scenes.evaluate", description=__doc__)
    parser.add_argument("--only", action="append", choices=PARTS, default=[], help="this part; may be repeated")
    parser.add_argument("--json", type=Path, default=Path("tiny_scenes.json"), help="results, added to (%(default)s)")
    parser.add_argument("--weights", type=Path, help="of train.py (default: those that are shipped)")
    parser.add_argument("--quick", action="store_true", help="a few of everything: numbers mean nothing")
    arguments = parser.parse_args(argv)
    pipe = load_pipeline(arguments.weights)
    results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    for name in arguments.only or PARTS:
        results[name] = PARTS[name](pipe, arguments.quick)
        run = {"steps": STEPS, "guidance": GUIDANCE, "quick": arguments.quick, "threads": torch.get_num_threads()}
        results["header"] = describe_run(quick=arguments.quick) | run | {"regions": "drawn scenes"}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
    print("\n\n".join(tables(results)))
    return 0


def tables(results: dict[str, Any]) -> list[str]:
    """What was found, as text."""
    shown = []
    if "gate" in results:
        gate = results["gate"]
        line = ", ".join(f"{name} {gate[name]:.3f}" for name in ("both present", "no other colour", "shape right"))
        shown.append(f"held-out prompts of two things, no layout, {gate['prompts']} images: {line}")
    for name in ("layouts", "similar"):
        if name in results:
            shown.append(layouts.table(results[name]))
    if "same" in results:
        shown.append(f"kernels and reference, largest difference of a score: {results['same']['difference']:.1e}")
    if "edits" in results:
        shown.append(edits.table(results["edits"]))
    if "inversion" in results:
        shown.append(chains.inversion_table(results["inversion"]))
    if "optimisation" in results:
        shown.append(chains.optimisation_table(results["optimisation"]))
    return shown


if __name__ == "__main__":
    raise SystemExit(main())
