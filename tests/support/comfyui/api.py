"""comfy_api.latest: the V3 schema, as much of it as nodes here use; unknown words are errors."""

from __future__ import annotations

import types
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Socket:
    """An input or output of a node."""

    kind: str
    id: str = ""
    display_name: str | None = None
    optional: bool = False
    tooltip: str | None = None
    default: Any = None
    min: float | None = None
    max: float | None = None
    step: float | None = None
    round: float | None = None
    advanced: bool | None = None
    options: list[str] | None = None


def of_kind(kind: str) -> type:
    """A type of values, with its Input and Output."""

    def made(id: str = "", **words: Any) -> Socket:  # noqa: A002
        return Socket(kind, id, **words)

    return type(
        kind, (), {"io_type": kind, "Input": staticmethod(made), "Output": staticmethod(made)}
    )


@dataclass
class Schema:
    """The description of a node."""

    node_id: str
    display_name: str | None = None
    category: str = "sd"
    inputs: list[Socket] = field(default_factory=list)
    outputs: list[Socket] = field(default_factory=list)
    description: str = ""
    is_experimental: bool = False
    search_aliases: list[str] = field(default_factory=list)


class NodeOutput:
    """The values of a node's outputs."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class ComfyNode:
    """A node, all class methods."""

    @classmethod
    def run(cls, **given: Any) -> Any:
        """Its only output for some inputs; those that are not given have their defaults."""
        inputs = cls.define_schema().inputs
        assert set(given) <= {socket.id for socket in inputs}
        values = {one.id: one.default for one in inputs if not one.optional} | given
        (value,) = cls.execute(**values).args
        return value


class ComfyExtension:
    """A pack of nodes."""

    async def get_node_list(self) -> list[type[ComfyNode]]:
        raise NotImplementedError


io = types.SimpleNamespace(
    Schema=Schema,
    ComfyNode=ComfyNode,
    NodeOutput=NodeOutput,
    Custom=of_kind,
    Model=of_kind("MODEL"),
    Mask=of_kind("MASK"),
    Conditioning=of_kind("CONDITIONING"),
    Float=of_kind("FLOAT"),
    Int=of_kind("INT"),
    Boolean=of_kind("BOOLEAN"),
    Combo=of_kind("COMBO"),
)
latest = types.ModuleType("comfy_api.latest")
vars(latest).update(io=io, ComfyExtension=ComfyExtension)
