"""Six layouts to begin with."""

from __future__ import annotations

import numpy as np

from dense_attn.examples.tiny_scenes.sheet import shipped_rows

from .canvas import GRID
from .settings import Settings


def layouts() -> list[Settings]:
    """The scenes of the demo's sheet, in the words of the small model."""
    found = []
    for row in shipped_rows():
        masks = row.masks.numpy()  # bool [R, 32, 32]
        numbers = np.arange(1, len(masks) + 1, dtype=np.uint8)[:, None, None]
        cell = GRID // masks.shape[-1]
        labels = (masks * numbers).max(0).repeat(cell, 0).repeat(cell, 1)
        found.append(Settings(row.prompt, labels, tuple(row.phrases)))
    return found
