"""Results of tensors that are kept for the calls to come."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Kept:
    """Results that live as long as the tensor that they are made of, or that it is a view of.

    They are made again where it has changed in place; one whose changes are not counted, made in
    inference mode, keeps none.
    """

    def __init__(self) -> None:
        self.owners = WeakTensorKeyDictionary()

    def of(self, x: Tensor, name: Hashable, make: Callable[[], Any]) -> Any:
        """The result of a name for x, which must hold no tensor that x is, or is a view of."""
        if x.is_inference():
            return make()
        kept = self.owners.setdefault(x._base if x._is_view() else x, {})
        form = name, x.shape, x.dtype, x.stride(), x.storage_offset()
        if (found := kept.get(form)) is None or found[0] != x._version:
            kept[form] = found = x._version, make()
        return found[1]
