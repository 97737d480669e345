"""Functions of a denoiser that know one text alone, for the texts of regions beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from .._attention_hook import MARKS
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

    def __getstate__(self) -> dict[str, Any]:
        """That of a copied or pickled module, which is in no block: its own function."""
        return vars(self) | {"states": []}

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


class KeysBeside(Numbering):
    """A cross-attention layer's `forward`, given texts of regions as rows behind the call's own.

    A layer that cuts an image's tokens from its text by length, or whose model adds learned padding
    to so many tokens, takes no longer one. Its processor is run on the further rows first, with a
    query for each, and its mark keeps the keys that it makes.
    """

    def anew(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """The layer's output of its own rows."""
        rows, given = len(hidden_states), encoder_hidden_states
        if len(given) > rows:
            mark = getattr(self.module, MARKS)[-1]
            queries = hidden_states[:, :1].repeat(len(given) // rows - 1, 1, 1)
            mark.gathers = len(queries)
            try:
                self.own(queries, given[rows:])
            finally:
                mark.gathers = 0
        return self.own(hidden_states, given[:rows], *args, **kwargs)


@contextmanager
def numbered(state: Any) -> Iterator[None]:
    """The function of a model's record gives texts of regions their places inside the block."""
    with ExitStack() as stack:
        for kind, module, name in _functions(state) if isinstance(state, RegionState) else ():
            there = getattr(vars(module).get(name), "__self__", None)
            one = there if isinstance(there, kind) else kind(module, name)
            stack.enter_context(one.of(state))
        yield


def _functions(state: RegionState) -> Iterator[tuple[type[Numbering], Any, str]]:
    """The functions that a block exchanges: of its denoisers, and of the layers of texts beside."""
    if state.model.numbering is not None:
        path, name = state.model.numbering
        for denoiser in state.model.denoisers(state.pipe).values():
            yield Numbering, unwrapped(denoiser).get_submodule(path), name
    for layer in state.attentions.values():
        if getattr(layer, MARKS)[-1].kind == state.model.beside:
            yield KeysBeside, layer, "forward"
