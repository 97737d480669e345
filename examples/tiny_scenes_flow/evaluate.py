"""Does it work on a flow? `python -m dense_attn.examples.tiny_scenes_flow.evaluate` tells."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dense_attn import _command

from ..tiny_scenes import edits
from ..tiny_scenes.editing import grids, unique
from ..tiny_scenes.evaluate import Evaluation, Results, evaluate, gate_line
from ..tiny_scenes.layouts import gate
from . import inversion, layouts, optimisation, round_trips, sheet
from .model import load_pipeline

PARTS: dict[str, Callable[[Any, bool, int], Results]] = {
    "gate": lambda pipe, quick, _: gate(pipe, 4 if quick else 200),
    "layouts": lambda pipe, quick, seeds: layouts.study(
        pipe, *((2, 1, 2) if quick else (200, seeds, 40))
    ),
    "edits": lambda pipe, quick, _: edits.study(pipe, 2 if quick else 12),
    "grids": lambda pipe, quick, _: grids.study(pipe, 2 if quick else 8),
    "unique": lambda pipe, quick, _: unique.study(pipe, 2 if quick else 16),
    "round-trips": lambda pipe, quick, _: round_trips.study(pipe, *((2, (4,)) if quick else ())),
    "inversion": lambda pipe, quick, _: inversion.study(
        pipe, *((1, (4,), (8,), 10) if quick else ())
    ),
    "optimisation": lambda pipe, quick, _: optimisation.study(pipe, *((2, 2) if quick else ())),
}
TABLES = {
    "layouts": layouts.table,
    "edits": edits.table,
    "grids": grids.table,
    "unique": unique.table,
    "round-trips": round_trips.table,
    "inversion": inversion.table,
    "optimisation": optimisation.table,
}


def main(argv: list[str] | None = None) -> int:
    """Evaluate the flow model."""
    return evaluate(EVALUATION, argv)


def tables(results: Results) -> list[str]:
    """The results as text."""
    shown = [gate_line(results["gate"])] if "gate" in results else []
    return shown + [table(results[name]) for name, table in TABLES.items() if name in results]


PLOTS = {
    "layouts": lambda pipe, _, output: sheet.draw(pipe, output),
    "edits": lambda _, result, output: edits.plot(result, output),
    "grids": lambda _, result, output: grids.plot(result, output),
}
EVALUATION = Evaluation(
    "dense_attn.examples.tiny_scenes_flow.evaluate", load_pipeline, PARTS, tables, PLOTS
)


if __name__ == "__main__":
    raise SystemExit(_command.run("evaluate", main))
