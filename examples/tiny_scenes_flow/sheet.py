"""The sheet of layouts on the flow model: what each way of modulation makes of the same noise."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from dense_attn.integrations.diffusers import Region, apply_layout

from ..tiny_scenes.score import generate
from ..tiny_scenes.sheet import Row, shipped_rows
from ..tiny_scenes.sheet import draw as _draw
from .layouts import DEFAULT, OTHERS
from .model import OneEncoder

COLUMNS = {  # names as they fit, and rows of the study
    "plain": "plain",
    "range": "range 1 and 0.3, first 30%",
    "mask": "mask on image->text",
    "bias (default)": DEFAULT,
    "prompt per region": "a prompt per region",
}
MILLIONS = 5


def draw(pipe: OneEncoder, output: Path) -> None:
    """The shipped scenes in every column, from the noises 0 to 5."""
    rows = shipped_rows()
    images = {"layout": torch.stack([row.picture for row in rows])}
    for name, setting in COLUMNS.items():
        images[name] = torch.cat([image(pipe, row, setting, i) for i, row in enumerate(rows)])
    _draw(rows, images, output, MILLIONS)


def image(pipe: OneEncoder, row: Row, setting: str, seed: int) -> Tensor:
    """One row's image under a setting of the study, [1, 3, 32, 32]."""
    options = OTHERS[setting]
    if options is None:
        return generate(pipe, [row.prompt], [seed])
    own = {name: value for name, value in options.items() if name != "prompts"}
    regions = list(zip(row.phrases, row.masks.numpy()))
    if "prompts" in options:
        regions = [Region(mask, phrase) for phrase, mask in regions]
    return generate(pipe, [row.prompt], [seed], apply_layout(pipe, row.prompt, regions, **own))
