"""Places of text tokens that a denoiser makes of their number alone, begun anew in each slot."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..hooks import unwrapped
from .state import RegionState


@contextmanager
def numbered(state: Any) -> Iterator[None]:
    """The function of a model's record gives texts of regions their places inside the block."""
    if not isinstance(state, RegionState) or state.model.numbering is None:
        yield
        return
    path, name = state.model.numbering
    module = unwrapped(getattr(state.pipe, state.model.component)).get_submodule(path)
    own, before = getattr(module, name), vars(module).get(name)

    @functools.wraps(own)
    def anew(*args: Any, **kwargs: Any) -> Any:
        if not state.spans:
            return own(*args, **kwargs)
        return state.model.numbered(own, state.slots, *args, **kwargs)

    setattr(module, name, anew)
    try:
        yield
    finally:
        if vars(module).get(name) is anew:  # not what another has put around it in the meantime
            delattr(module, name)
            if before is not None:
                setattr(module, name, before)
