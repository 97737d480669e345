"""An estimate exchanged for another one on its way into a scheduler's step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

Change = Callable[[Tensor], Tensor]


@contextmanager
def exchanged(scheduler: Any, change: Change) -> Iterator[None]:
    """Inside the block `change` makes estimates others for steps; blocks may end in any order."""
    step = vars(scheduler).get("step")
    if not isinstance(step, _Step):
        step = _Step(scheduler, step)
        scheduler.step = step
    step.changes.append(change)
    try:
        yield
    finally:
        step.changes.remove(change)
        if not step.changes and vars(scheduler).get("step") is step:
            step.leave(scheduler)


class _Step:
    """A scheduler's step with other estimates."""

    def __init__(self, scheduler: Any, own: Callable[..., Any] | None) -> None:
        functools.update_wrapper(self, scheduler.step)
        self.own, self.step, self.changes = own, scheduler.step, list[Change]()

    def __call__(self, model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        for change in self.changes:
            model_output = change(model_output)
        return self.step(model_output, *args, **kwargs)

    def leave(self, scheduler: Any) -> None:
        """Put back what was there."""
        if self.own is None:
            del scheduler.step
        else:
            scheduler.step = self.own
