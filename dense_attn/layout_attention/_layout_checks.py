"""The checks of a Layout's arguments."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks

MAX_REGIONS = 32  # the bits of an int32 word
Span = tuple[int, int]


def as_tensor(argument: str, value: object) -> Tensor:
    """A tensor of a tensor's or array's values, which later writes of the caller do not reach."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "biufc":
            _checks.refuse(argument, "be an array of numbers or bools", value.dtype, TypeError)
        own = value.dtype.newbyteorder("=")  # torch knows this machine's byte order alone
        return torch.from_numpy(value.astype(own, order="C"))
    if not isinstance(value, Tensor):
        _checks.refuse(argument, "be a tensor or a numpy array", type(value).__name__, TypeError)
    return _checks.tensor(argument, value).detach().clone()


def check_masks(masks: Tensor) -> Tensor:
    """Require bool [R, H, W] of 1 to 32 regions that are not empty."""
    if masks.dtype != torch.bool:
        _checks.refuse("masks", "be bool", _checks.name(masks.dtype), TypeError)
    if masks.dim() != 3:
        _checks.refuse("masks", "have 3 dimensions [regions, height, width]", tuple(masks.shape))
    if not 1 <= len(masks) <= MAX_REGIONS:
        _checks.refuse("masks", f"hold 1 to {MAX_REGIONS} regions", len(masks))
    empty = ~masks.flatten(1).any(1)
    if empty.any():
        _checks.refuse(
            "masks", "each hold at least one pixel", f"none in region {int(empty.nonzero()[0])}"
        )
    return masks


def check_spans(spans: object, num_regions: int) -> tuple[Span | None, ...]:
    """Require one (start, stop) or None a region."""
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        _checks.refuse(
            "spans",
            "be a list with (start, stop) or None for each region",
            type(spans).__name__,
            TypeError,
        )
    if len(spans) != num_regions:
        _checks.refuse("spans", f"hold one entry for each of the {num_regions} regions", len(spans))
    return tuple(
        None if span is None else _check_span(f"spans[{r}]", span) for r, span in enumerate(spans)
    )


def _check_span(argument: str, span: object) -> Span:
    if not isinstance(span, Sequence) or isinstance(span, str) or len(span) != 2:
        _checks.refuse(argument, "be a pair (start, stop) or None", repr(span), TypeError)
    start, stop = (integer(argument, bound, 0) for bound in span)
    if start >= stop:
        _checks.refuse(argument, "be a pair (start, stop) with start < stop", (start, stop))
    return start, stop


def check_box(argument: str, box: object) -> None:
    """Require (x0, y0, x1, y1) of an area inside the image."""
    if not isinstance(box, Sequence) or isinstance(box, str) or len(box) != 4:
        _checks.refuse(argument, "be (x0, y0, x1, y1)", repr(box), TypeError)
    for value in box:
        _checks.number(argument, value)
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        _checks.refuse(argument, "have 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1", tuple(box))


def integer(argument: str, value: object, least: int) -> int:
    """Require an integer from `least` up."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        _checks.refuse(argument, "be an integer", repr(value), TypeError)
    if value < least:
        _checks.refuse(argument, f"be at least {least}", value)
    return int(value)
