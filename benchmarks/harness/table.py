"""The lines that a run prints: one a row, under a heading of its family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
_NAME = 66  # characters


def _number(field: str, form: str, scale: float = 1) -> Callable[[Row], str]:
    return lambda row: "" if row.get(field) is None else format(scale * row[field], form)


def _iqr(row: Row) -> str:
    return "one round" if row["seconds_iqr"] is None else f"{1e3 * row['seconds_iqr']:.3f}"


def _of_allowed(row: Row) -> str:
    return f"{row['error'] / row['allowed']:.2f}" if row["allowed"] else "0"


_MEDIAN = [
    ("median ms", _number("seconds", ".3f", 1e3)),
    ("iqr", _iqr),
    ("x ours", _number("ratio", ".2f")),
]
_MEMORY = [("extra MB", _number("peak_extra_bytes", ".1f", 1e-6)), ("error/allowed", _of_allowed)]
_COLUMNS: dict[str, list[tuple[str, Callable[[Row], str]]]] = {
    "attention": [
        *_MEDIAN,
        ("GFLOP/s", _number("gflop_per_s", ".0f")),
        ("of matmul", _number("of_matmul", ".0%")),
        *_MEMORY,
    ],
    "percentile": [*_MEDIAN, *_MEMORY],
    "sega": [*_MEDIAN, *_MEMORY],
    "steps": [
        *_MEDIAN,
        ("GB/s", _number("gb_per_s", ".1f")),
        ("ours/copy", _number("of_copy", ".2f")),
        *_MEMORY,
    ],
    "chain": [
        *_MEDIAN,
        ("not network", _number("share", ".2%")),
        ("idle network", _number("share_idle", ".2%")),
        *_MEMORY,
    ],
    "gradient": [*_MEDIAN, *_MEMORY],
    "host_cost": [
        ("host us a call", _number("seconds", ".2f", 1e6)),
        ("x raw op", _number("of_op", ".2f")),
        ("x SDPA", _number("of_sdpa", ".2f")),
        ("launches", _number("launches", "d")),
    ],
    "launch": [
        ("host us a call", _number("seconds", ".2f", 1e6)),
        ("x public op", _number("ratio", ".2f")),
    ],
    "round_trip": [
        ("mix", _number("mix", "g")),
        ("largest error", _number("error", ".1e")),
        ("differing bits", _number("differing_bits", "d")),
        ("of bits", _number("bits", "d")),
    ],
}


def heading(row: Row) -> str:
    """The names of the columns of a row's family."""
    return f"{row['family'].replace('_', ' '):<{_NAME}}" + "".join(
        f"{name:>15}" for name, _ in _COLUMNS[row["family"]]
    )


def format_row(row: Row) -> str:
    """One line of the table."""
    name = f"{row['workload']:<21} {row['pass']:<8} {row['dtype']:<9} {row['contender']:<16}"
    backend = f" ({row['backend']})" if row["backend"] else ""
    if "reason" in row:
        return f"{name}{backend}: {row['reason']}"
    cells = (cell(row) for _, cell in _COLUMNS[row["family"]])
    note = f"  ({row['note']})" if "note" in row else ""
    return f"{name + backend:<{_NAME}}" + "".join(f"{cell:>15}" for cell in cells) + note
