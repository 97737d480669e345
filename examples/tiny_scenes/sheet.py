"""The demo's contact sheet: layouts, and what becomes of them, with an edit on top."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from dense_attn import _files
from dense_attn.integrations.diffusers import Edit, apply_layout, semantic_guidance

from .model import TOKENS, load_pipeline
from .scenes import (
    BACKGROUNDS,
    COLOURS,
    SIDE,
    WORDS,
    Scene,
    Thing,
    caption,
    colour_masks,
    masks,
    render,
)
from .score import LAYOUTS, generate, iou

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = ("layout", "plain", "paint-with-words", "DenseDiffusion", "and on another ground")
EDIT = {"scale": 12.0, "threshold": 0.5, "warmup": 2}  # a ground is half of the picture and more
SCENES = tuple(
    Scene(tuple(Thing(*thing) for thing in things))
    for things in (
        (("red", "circle", 9, 9, 7), ("blue", "square", 23, 23, 7)),
        (("blue", "square", 9, 23, 7), ("red", "circle", 23, 9, 7)),
        (("yellow", "triangle", 23, 10, 8), ("green", "circle", 9, 23, 7)),
        (("magenta", "circle", 16, 8, 6), ("cyan", "triangle", 16, 24, 7)),
        (
            ("orange", "square", 7, 7, 5),
            ("green", "triangle", 25, 9, 6),
            ("blue", "circle", 16, 24, 6),
        ),
        (
            ("red", "triangle", 6, 16, 5.5),
            ("orange", "circle", 17, 16, 5),
            ("yellow", "square", 27, 16, 5),
        ),
    )
)


class Row(NamedTuple):
    """A prompt, its regions, and what the layout's picture shows."""

    prompt: str
    phrases: list[str]
    masks: Tensor  # bool [R, 32, 32]
    picture: Tensor  # [3, 32, 32]


def shipped_rows() -> list[Row]:
    """Six scenes, whose prompts leave the ground open."""
    return [
        Row(caption(scene.phrases), scene.phrases, masks(scene), render([scene])[0])
        for scene in SCENES
    ]


def users_row(regions: Tensor, phrases: Sequence[str]) -> Row:
    """A layout of one's own: masks bool [R, H, W], and what each shows in words of the model."""
    small = (
        torch.nn.functional.interpolate(regions[None].float(), (SIDE, SIDE), mode="area")[0] > 0.5
    )
    picture = torch.full((3, SIDE, SIDE), 0.5, dtype=torch.float32, device="cpu")
    for mask, phrase in zip(small, phrases):
        colour = next(
            (COLOURS[word] for word in phrase.split() if word in COLOURS), (0.75, 0.75, 0.75)
        )
        picture[:, mask] = picture.new_tensor(colour)[:, None]
    return Row(caption(phrases), list(phrases), small, picture)


def why_not(row: Row) -> list[str]:
    """Reasons why the model cannot paint a row."""
    reasons, words = [], row.prompt.split()
    if unknown := dict.fromkeys(word for word in words if word not in WORDS):
        reasons.append(f"the small model knows {', '.join(WORDS)}; not {', '.join(unknown)}")
    if len(words) > TOKENS - 2:
        reasons.append(f"it reads {TOKENS - 2} words, got {len(words)} in {row.prompt!r}")
    hidden = [phrase for phrase, mask in zip(row.phrases, row.masks) if not mask.any()]
    if hidden:
        reasons.append(f"no pixel of {SIDE} x {SIDE} is left of {', '.join(hidden)}")
    return reasons


def make(
    rows: Sequence[Row],
    pipe: StableDiffusionPipeline | None = None,
    backend: str = "auto",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Images [rows, 3, 32, 32] of each column."""
    pipe = pipe or load_pipeline()
    found = {"layout": torch.stack([row.picture for row in rows])}
    for name in COLUMNS[1:-1]:
        setting = LAYOUTS[name]
        found[name] = torch.cat(
            [_image(pipe, row, setting, backend, seed + i) for i, row in enumerate(rows)]
        )
    laid_out, setting = found["DenseDiffusion"], LAYOUTS["DenseDiffusion"]
    grounds = [other_ground(image) for image in laid_out]
    edited = [
        _image(pipe, row, setting, backend, seed + i, grounds[i]) for i, row in enumerate(rows)
    ]
    return found | {COLUMNS[-1]: torch.cat(edited)}


def other_ground(image: Tensor) -> str:
    """White, or black for an image [3, H, W] on white."""
    found = {
        name: mask.sum() for name, mask in colour_masks(image[None]).items() if name in BACKGROUNDS
    }
    return "black" if max(found, key=found.get) == "white" else "white"


def _image(
    pipe: StableDiffusionPipeline,
    row: Row,
    setting: dict | None,
    backend: str,
    seed: int,
    ground: str = "",
) -> Tensor:
    with ExitStack() as blocks:
        if setting is not None:
            regions = list(zip(row.phrases, row.masks.numpy()))
            blocks.enter_context(
                apply_layout(pipe, row.prompt, regions, backend=backend, **setting)
            )
        if ground:
            edit = Edit(f"on {ground}", **EDIT)
            blocks.enter_context(semantic_guidance(pipe, [edit], backend=backend))
        return generate(pipe, [row.prompt], [seed])


def overlap(image: Tensor, row: Row) -> float | None:
    """How well each colour's pixels lie in its phrases' regions, a mean; None without colours."""
    targets: dict[str, Tensor] = {}
    for phrase, mask in zip(row.phrases, row.masks):
        targets |= {
            word: targets.get(word, mask) | mask for word in phrase.split() if word in COLOURS
        }
    found = colour_masks(image[None])
    values = [iou(found[colour][0], target) for colour, target in targets.items()]
    return sum(values) / len(values) if values else None


def draw(rows: Sequence[Row], images: dict[str, Tensor], output: Path, millions: int = 4) -> None:
    """Write the sheet to a file, with a column for each name of images."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.6 + 2.25 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots(len(rows), len(images), squeeze=False)
    for line, row in enumerate(rows):
        for place, name in zip(axes[line], images):
            _draw_one(place, images[name][line], row, name)
        if COLUMNS[-1] in images:
            ground = other_ground(images["DenseDiffusion"][line])
            axes[line][-1].set_xlabel(f"{axes[line][-1].get_xlabel()}, on {ground}")
        axes[line][0].set_ylabel(row.prompt.replace(" and ", "\nand "), fontsize=9)
    for place, name in zip(axes[0], images):
        place.set_title(name, fontsize=11, fontweight="bold")
    note = "Numbers: overlap (IoU) of each phrase's colour with its region. A model of"
    figure.supxlabel(f"{note} {millions} million parameters.", fontsize=9, color="#666666")
    _files.write_by(output, partial(figure.savefig, format=output.suffix[1:]))


def _draw_one(place: Axes, image: Tensor, row: Row, name: str) -> None:
    place.imshow(image.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    place.set(xticks=[], yticks=[])
    for mask in row.masks:
        place.contour(mask.float().numpy(), levels=[0.5], colors="#888888", linewidths=0.8)
    value = None if name == "layout" else overlap(image, row)
    if value is not None:
        place.set_xlabel(f"{value:.2f}", fontsize=9)
