"""Results of tensors that are kept for the calls to come."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class Kept:
    """Results that live as long as the tensor that they are made of, or that it is a view of.

    They are made again where it has changed in place; one whose changes are not counted, made in
    inference mode, keeps none. Results made in that mode, which no gradient may keep, are its own.
    """

    def __init__(self) -> None:
        self.owners = WeakTensorKeyDictionary()

    def of(self, x: Tensor, name: Hashable, make: Callable[[], Any]) -> Any:
        """The result of a name for x, which must hold no tensor that x is, or is a view of."""
        if x.is_inference():
            return make()
        kept = self.owners.setdefault(x._base if x._is_view() else x, {})
        inference = torch.is_inference_mode_enabled()
        form = name, x.shape, x.dtype, x.stride(), x.storage_offset(), inference
        if (found := kept.get(form)) is None or found[0] != x._version:
            kept[form] = found = x._version, make()
        return found[1]
