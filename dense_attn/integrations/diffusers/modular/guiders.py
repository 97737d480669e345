"""Which of a guider's estimates a call of the denoiser is for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from dense_attn import _checks

from ..rows import Rows

PROMPT, NEGATIVE = "pred_cond", "pred_uncond"  # what guiders call the estimates of both prompts
PREPARES = "prepare_inputs", "prepare_inputs_from_block_state"


class _Calls:
    """The estimates of a step in the order in which a guider asks for them."""

    def __init__(self, guider: Any) -> None:
        self.key = guider._identifier_key
        self.names: list[str] = []
        self.prepared = 0  # calls of the denoiser since
        self.users = 0
        self.wrapped = {name: self._listing(getattr(guider, name)) for name in PREPARES}
        self.wrapped["prepare_models"] = self._counting(guider.prepare_models)

    def _listing(self, prepare: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        @functools.wraps(prepare)
        def prepared(*args: Any, **kwargs: Any) -> list[Any]:
            batches = prepare(*args, **kwargs)
            self.names, self.prepared = [getattr(batch, self.key) for batch in batches], 0
            return batches

        return prepared

    def _counting(self, prepare: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(prepare)
        def counted(*args: Any, **kwargs: Any) -> None:
            self.prepared += 1
            prepare(*args, **kwargs)

        return counted


_followed: WeakKeyDictionary[Any, _Calls] = WeakKeyDictionary()


@contextmanager
def followed(guider: Any) -> Iterator[None]:
    """Inside the block a guider tells what it asks for; blocks may end in any order."""
    if guider is None:
        yield
        return
    calls = _followed.setdefault(guider, _Calls(guider))
    if not calls.users:
        vars(guider).update(calls.wrapped)
    calls.users += 1
    try:
        yield
    finally:
        calls.users -= 1
        if not calls.users:
            del _followed[guider]
            for name, wrapped in calls.wrapped.items():
                if vars(guider).get(name) is wrapped:
                    del vars(guider)[name]


class GuidedRows(Rows):
    """Follows the calls of a modular pipeline, each of which is of one estimate alone."""

    def of(
        self,
        latents: Tensor,
        text: Tensor,
        repeated: bool,
        known: int | None = None,
        heard: bool = False,
    ) -> tuple[int, int] | None:
        """All rows where the call is for the prompt's estimate, None for any other."""
        guider = getattr(self.pipe, "guider", None)
        if guider is not None:
            calls = _followed.get(guider)
            if calls is None:
                rule = "keep its guider inside of the block"
                _checks.refuse("pipe", rule, f"another {type(guider).__name__}")
            if not 0 < calls.prepared <= len(calls.names):
                rule = "prepare its guider before each call of its denoiser"
                got = f"call {calls.prepared} of {len(calls.names)} that were prepared"
                _checks.refuse("pipe", rule, got)
            name = calls.names[calls.prepared - 1]
            self.beside = name not in (PROMPT, NEGATIVE)
            if name != PROMPT:
                return None
        if len(text) not in (1, len(latents)):
            got = f"{len(text)} texts for {len(latents)} rows"
            _checks.refuse("pipe", "give each row of latents its text", got)
        return self._whole(0, len(latents))
