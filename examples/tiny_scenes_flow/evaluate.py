"""Does it work on a flow? `python -m dense_attn.examples.tiny_scenes_flow.evaluate` tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from dense_attn import _command

from ..tiny_scenes import edits
from ..tiny_scenes.evaluate import Evaluation, Results, evaluate, gate_line
from ..tiny_scenes.layouts import gate
from . import inversion, layouts, optimisation, sheet
from .model import OneEncoder, load_pipeline

PARTS: dict[str, Callable[[Any, bool, int], Results]] = {
    "gate": lambda pipe, quick, _: gate(pipe, 4 if quick else 200),
    "layouts": lambda pipe, quick, seeds: layouts.study(
        pipe, *((2, 1, 2) if quick else (100, seeds, 40))
    ),
    "edits": lambda pipe, quick, _: edits.study(pipe, 2 if quick else 12),
    "inversion": lambda pipe, quick, _: inversion.study(
        pipe, *((1, (4,), (8,), 10) if quick else ())
    ),
    "optimisation": lambda pipe, quick, _: optimisation.study(pipe, *((2, 2) if quick else ())),
}
TABLES = {
    "layouts": layouts.table,
    "edits": edits.table,
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


def draw(pipe: OneEncoder, results: Results, parts: list[str], file: Path) -> None:
    """The sheet of layouts."""
    if "layouts" in parts:
        sheet.draw(pipe, file.with_suffix(".png"))


EVALUATION = Evaluation(
    "dense_attn.examples.tiny_scenes_flow.evaluate", load_pipeline, PARTS, tables, draw
)


if __name__ == "__main__":
    raise SystemExit(_command.run("evaluate", main))
