"""All that a run of a chain needs beside its latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from dense_attn import _memory
from dense_attn._backends import table
from dense_attn.reversible.links import Chain

EpsFn = Callable[[Tensor, object], Tensor]


class Memory:
    """Blocks whose errors of too little memory name a chain's latents; holds no tensor."""

    def __init__(self, x: Tensor, least: int) -> None:
        self.shape, self.dtype, self.device, self.least = x.shape, x.dtype, x.device, least

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, RuntimeError):
            _memory.explain(error, "ReversibleSampler", self.least, x=self)


@dataclass
class Plan:
    """All that a run needs beside the latents."""

    backend: str
    chain: Chain | None  # None for plain steps
    eps_fn: EpsFn
    timesteps: Sequence[object]
    dtype: torch.dtype  # of what the network is fed
    exact: bool
    memory: Memory  # around all but eps_fn, whose own errors are the caller's
    parameters: bool = True  # whether those of eps_fn get a gradient
    progress: str = ""  # what the bar says

    @property
    def kernels(self) -> ModuleType:
        """The ops of the backend."""
        return table.NAMESPACES[self.backend]
