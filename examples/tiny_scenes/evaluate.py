"""Does it work? `python -m dense_attn.examples.tiny_scenes.evaluate` tells, or a part of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from dense_attn import _command, _files
from dense_attn.benchmarks.harness.header import describe_run

from . import edits, inversion, layouts, optimisation, sheet
from .editing import grids, negation, unique, ways
from .model import load_pipeline
from .score import usual_of

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
        "optimisation": optimisation.same_tables(pipe, 2 if quick else 7, 2 if quick else 10),
    },
    "edits": lambda pipe, quick, _: edits.study(pipe, 2 if quick else 24),
    "ways": lambda pipe, quick, _: ways.study(pipe, 2 if quick else 16),
    "negation": lambda pipe, quick, _: negation.study(pipe, 2 if quick else 16),
    "grids": lambda pipe, quick, _: grids.study(pipe, 2 if quick else 8),
    "unique": lambda pipe, quick, _: unique.study(pipe, 4 if quick else 16),
    "inversion": lambda pipe, quick, _: inversion.study(
        pipe, 1 if quick else 8, (4,) if quick else (25, 50, 100, 200)
    ),
    "optimisation": lambda pipe, quick, _: optimisation.study(
        pipe, 2 if quick else 14, 2 if quick else 10
    ),
}
Results = dict[str, Any]
EDITING = {"ways": ways, "negation": negation, "grids": grids, "unique": unique}
RUN = ("date", "git_revision", "device", "threads", "quick")  # of the header, kept with each part


class Evaluation(NamedTuple):
    """The studies of a model, and what is made of them."""

    program: str  # the module to run
    load: Callable[[Path | None], DiffusionPipeline]
    parts: dict[str, Callable[[Any, bool, int], Results]]  # of a pipeline, quickly, seeds
    tables: Callable[[Results], list[str]]
    plots: dict[str, Callable[[Any, Results, Path], None]]  # of a part, to a file


def main(argv: list[str] | None = None) -> int:
    """Evaluate the first model."""
    return evaluate(EVALUATION, argv)


def evaluate(evaluation: Evaluation, argv: list[str] | None = None) -> int:
    """Run the parts, add them to the file, print the tables of all that is in it."""
    arguments = _parse(evaluation, argv)
    file, parts = arguments.json, arguments.only or list(evaluation.parts)
    pictures = {name: file.with_name(f"{file.stem}-{name}.png") for name in evaluation.plots}
    pictures["layouts"] = file.with_suffix(".png")
    for path in (file, *pictures.values()):
        _files.check(path)
    pipe = evaluation.load(arguments.weights)
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for name in parts:
        results[name] = evaluation.parts[name](pipe, arguments.quick, arguments.seeds)
        results["header"] = header = _header(pipe, arguments.quick)
        results[name]["run"] = {key: header[key] for key in RUN}
        _files.write(file, json.dumps(results, indent=1) + "\n")
    for name in set(parts) & evaluation.plots.keys():
        evaluation.plots[name](pipe, results[name], pictures[name])
    print("\n\n".join(evaluation.tables(results)))
    return 0


def _sheet(pipe: StableDiffusionPipeline, _: Results, output: Path) -> None:
    rows = sheet.shipped_rows()
    sheet.draw(rows, sheet.make(rows, pipe), output)


PLOTS = {
    "layouts": _sheet,
    "edits": lambda _, result, output: edits.plot(result, output),
    "grids": lambda _, result, output: grids.plot(result, output),
}


def _parse(evaluation: Evaluation, argv: list[str] | None) -> argparse.Namespace:
    name, folder = evaluation.program, evaluation.program.split(".")[-2]
    parser = argparse.ArgumentParser(f"python -m {name}", description=__doc__)
    add = parser.add_argument
    part = "this part; may be repeated"
    add("--only", action="append", choices=evaluation.parts, default=[], help=part)
    results = "results, added to (%(default)s)"
    add("--json", type=Path, default=Path(f"{folder}.json"), help=results)
    add("--weights", type=Path, help="of train.py (default: those that are shipped)")
    seeds = "noises of a layout (%(default)s; --quick: 1)"
    add("--seeds", type=int, default=3, help=seeds)
    quick = "a few of everything: numbers mean nothing"
    add("--quick", action="store_true", help=quick)
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {arguments.seeds}")
    return arguments


def _header(pipe: DiffusionPipeline, quick: bool) -> dict[str, Any]:
    usual, threads = usual_of(pipe), torch.get_num_threads()
    run = {"steps": usual["num_inference_steps"], "guidance": usual["guidance_scale"]}
    run |= {"quick": quick, "threads": threads}
    return describe_run(quick=quick) | run | {"regions": "drawn scenes"}


def gate_line(gate: dict[str, Any]) -> str:
    """The shares of a gate as text."""
    line = ", ".join(f"{name} {gate[name]:.3f}" for name in layouts.GATE)
    return f"held-out prompts of two things, no layout, {gate['prompts']} images: {line}"


def tables(results: Results) -> list[str]:
    """The results as text."""
    shown = [gate_line(results["gate"])] if "gate" in results else []
    shown += [layouts.table(results[name]) for name in ("layouts", "similar") if name in results]
    if "same" in results:
        lines = ["kernels and reference, largest differences"]
        for name in ("layouts", "edits", "optimisation"):
            found = results["same"][name]
            apart = [key for key in found if key.startswith("of ")]
            lines += [f"{name}, {key}: {found[key]:.1e}" for key in apart]
        shown.append("\n".join(lines))
    if "edits" in results:
        shown += [edits.table(results["edits"]), edits.curves(results["edits"])]
    for name, part in (
        ("ways", ways),
        ("negation", negation),
        ("grids", grids),
        ("unique", unique),
    ):
        if name in results:
            shown.append(part.table(results[name]))
    if "inversion" in results:
        shown.append(inversion.table(results["inversion"]))
    if "optimisation" in results:
        shown.append(optimisation.table(results["optimisation"]))
    return shown


EVALUATION = Evaluation(
    "dense_attn.examples.tiny_scenes.evaluate", load_pipeline, PARTS, tables, PLOTS
)


if __name__ == "__main__":
    raise SystemExit(_command.run("evaluate", main))
