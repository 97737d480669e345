"""Places of text tokens that a denoiser makes of their number alone, begun anew in each slot."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from ..hooks import unwrapped
from .state import RegionState


class Numbering:
    """A module's function that numbers tokens, for the last of the blocks that are on."""

    def __init__(self, module: Any, name: str) -> None:
        self.module, self.name = module, name
        self.own, self.before = getattr(module, name), vars(module).get(name)
        self.states: list[RegionState] = []

    def anew(self, *args: Any, **kwargs: Any) -> Any:
        """The function while blocks are on; a method, which torch.compile does not know by id."""
        if not self.states or not self.states[-1].spans:
            return self.own(*args, **kwargs)
        state = self.states[-1]
        return state.model.numbered(self.own, state.slots, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Numbering:
        """That of a copied module, which is in no block: its own function."""
        other, memo[id(self.states)] = object.__new__(Numbering), []
        vars(other).update(copy.deepcopy(vars(self), memo))
        return other

    @property
    def stands(self) -> bool:
        """Whether no other has put a function around it in the meantime."""
        return vars(self.module).get(self.name) == self.anew

    @contextmanager
    def of(self, state: RegionState) -> Iterator[None]:
        """A block is on; blocks may end in any order, and the last leaves what there was."""
        self.states.append(state)
        setattr(self.module, self.name, self.anew)
        try:
            yield
        finally:
            state.spans = ()
            self.states.remove(state)
            if not self.states and self.stands:
                delattr(self.module, self.name)
                if self.before is not None:
                    setattr(self.module, self.name, self.before)


@contextmanager
def numbered(state: Any) -> Iterator[None]:
    """The function of a model's record gives texts of regions their places inside the block."""
    with ExitStack() as stack:
        if isinstance(state, RegionState) and state.model.numbering is not None:
            path, name = state.model.numbering
            for denoiser in state.model.denoisers(state.pipe).values():
                module = unwrapped(denoiser).get_submodule(path)
                there = getattr(vars(module).get(name), "__self__", None)
                one = there if isinstance(there, Numbering) else Numbering(module, name)
                stack.enter_context(one.of(state))
        yield
