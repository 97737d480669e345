"""A model's record: how its denoiser is called, and which tokens attend to which."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dense_attn import Layout

    from ..state import LayoutState, Side
    from .processor import LayoutProcessor


class Call(NamedTuple):
    """The arguments of a denoiser's call that a layout depends on."""

    timestep: Tensor | float
    text: Tensor  # [B, L, C]
    latents: Tensor  # [B, C, H, W], or packed [B, N, C]
    places: Tensor | None = None  # of packed ones, [N, 3] or [B, N, 3]: image, row, column

    @property
    def key(self) -> object:
        """Equal where the grid of latents is."""
        return tuple(self.latents.shape), id(self.places)


class Entry(NamedTuple):
    """The layers of one kind and size."""

    kind: str
    depth: int  # halvings of the grid of latents
    q: Side
    k: Side  # the same object where queries and keys are the same tokens
    order: Tensor  # int32 [P, M], of the queries


@dataclass(frozen=True)
class Model(ABC):
    """A kind of denoiser; a subclass is all that the library knows of it."""

    denoiser: ClassVar[str]  # the name of its class
    component: ClassVar[str] = "transformer"  # the pipeline's name for it
    latents: ClassVar[str] = "hidden_states"  # the argument that brings them
    unit: ClassVar[float] = 1.0  # of its timesteps, in the scheduler's
    guidance_apart: ClassVar[bool] = False  # whether a negative prompt has calls of its own
    processor: ClassVar[type[LayoutProcessor]]
    replaces: ClassVar[tuple[str, ...]]  # the attention processors whose place it can take

    @classmethod
    @abstractmethod
    def of(cls, denoiser: torch.nn.Module) -> Model:
        """The record of one denoiser."""

    @abstractmethod
    def layers(
        self, state: LayoutState, layouts: list[Layout], text: Side, call: Call
    ) -> Iterator[Entry]:
        """Every kind and size of attention layers."""

    def read(self, arguments: dict[str, Any]) -> Call:
        """The layout's part of a call."""
        latents, text = arguments[self.latents], arguments["encoder_hidden_states"]
        return Call(arguments["timestep"], text, latents, arguments.get("img_ids"))

    def grid(self, call: Call) -> tuple[int, int]:
        """The latents' height and width."""
        return tuple(call.latents.shape[2:])

    def depth(self, denoiser: torch.nn.Module, name: str) -> int:
        """How often the grid is halved where a layer is; -1 for layers of no grid."""
        return 0
