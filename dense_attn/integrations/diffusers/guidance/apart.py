"""Concepts' own calls of a denoiser, outside of the hooks around the pipeline's."""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dense_attn import _checks

from ..hooks import unwrapped, watchers
from ..state import LayoutState


def estimates_of(denoiser: torch.nn.Module, calls: list[dict[str, Any]]) -> list[Any]:
    """The estimates of calls of a denoiser by their arguments' names, under no layout."""
    signature = inspect.signature(type(unwrapped(denoiser)).forward)
    bound = [inspect.BoundArguments(signature, OrderedDict(given)) for given in calls]
    with _plain(denoiser):
        return [denoiser.forward(*call.args[1:], **call.kwargs)[0] for call in bound]


@contextmanager
def _plain(denoiser: torch.nn.Module) -> Iterator[None]:
    """Inside the block calls of the denoiser have no layout, and no cache of steps may be on."""
    if getattr(unwrapped(denoiser), "is_cache_enabled", False):
        rule = "have no cache of steps while concepts have calls of their own"
        _checks.refuse("pipe", rule, type(unwrapped(denoiser)._cache_config).__name__)
    layouts = [block for block in watchers(denoiser) if isinstance(block, LayoutState)]
    rows = [(layout.first, layout.last) for layout in layouts]
    for layout in layouts:
        layout.first = layout.last = 0
    try:
        yield
    finally:
        for layout, (first, last) in zip(layouts, rows):
            layout.first, layout.last = first, last
