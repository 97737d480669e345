"""Sockets and descriptions that the pack's nodes share."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

Regions = io.Custom("DENSE_ATTN_REGIONS")
Edits = io.Custom("DENSE_ATTN_EDITS")


def node(name: str, title: str, says: str, inputs: list[Any], output: Any) -> io.Schema:
    """A node of the pack."""
    return io.Schema(
        node_id=f"DenseAttn{name}",
        display_name=title,
        category="dense_attn",
        description=says,
        inputs=inputs,
        outputs=[output],
    )


def patch(name: str, title: str, says: str, *inputs: Any) -> io.Schema:
    """A node that takes a model and returns it changed."""
    before, after = io.Model.Input("model"), io.Model.Output("model")
    return node(name, title, says, [before, *inputs], after)


def number(
    name: str,
    default: float,
    most: float = 1.0,
    *,
    least: float = 0.0,
    step: float = 0.05,
    **more: Any,
) -> Any:
    """A number's widget, with its tooltip if any."""
    return io.Float.Input(name, default=default, min=least, max=most, step=step, **more)


def percents(end: float) -> list[Any]:
    """The part of the schedule in which a model is changed."""
    starts_and_ends = ("start_percent", 0.0), ("end_percent", end)
    return [number(name, default, step=0.01) for name, default in starts_and_ends]
