"""A modular pipeline as layouts see it: with the encode_prompt of its text encoder's block."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dense_attn import _checks

from ..text.encoding import heard
from .guiders import followed


def viewed(pipe: Any) -> Any:
    """A modular pipeline with an encode_prompt and its helpers as methods; others as they are."""
    kind = type(pipe).__name__
    if all(base.__name__ != "ModularPipeline" for base in type(pipe).__mro__):
        return pipe
    steps = [step for step in _steps(pipe._blocks) if hasattr(step, "encode_prompt")]
    if len(steps) != 1:
        rule = "have one block with an encode_prompt, as those of SDXL, FLUX, Wan and Z-Image have"
        _checks.refuse("pipe", rule, f"{kind} with {len(steps)}")
    if getattr(pipe, "guider_2", None) is not None:
        _checks.refuse("pipe", "have one guider", f"{kind} with a guider_2")
    # what phrases ask a class: how prompts are cleaned, and whether they become chats
    module = vars(sys.modules[type(steps[0]).__module__])
    helpers = {f"_{name}": call for name, call in module.items() if inspect.isfunction(call)}
    return type(kind, (Modular,), helpers)(pipe, steps[0])


@contextmanager
def listened(pipe: Any, tell: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """`tell` gets the arguments of every call of encode_prompt inside the block, after it."""
    if not isinstance(pipe, Modular):
        with heard(pipe, tell):
            yield
        return
    with heard(pipe.step, tell), followed(getattr(pipe, "guider", None)):
        yield


def _steps(block: Any) -> Iterator[Any]:
    """A block and all blocks in it."""
    yield block
    for inner in getattr(block, "sub_blocks", {}).values():
        yield from _steps(inner)


class Modular:
    """A view of a modular pipeline; what it does not have itself is the pipeline's.

    Args:
        pipe: the pipeline.
        step: its block that encodes prompts.
    """

    denoising_end = None  # steps are counted of the whole schedule

    def __init__(self, pipe: Any, step: Any) -> None:
        self.pipe, self.step = pipe, step
        own = step.encode_prompt
        self.encode_prompt = functools.partial(getattr(own, "encode_prompt", own), pipe)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipe, name)
