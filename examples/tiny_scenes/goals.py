"""The goals of optimised noise: a thing's colour or its place, which a prompt leaves open."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .scenes import COLOURS, PRESENT, SHAPES, SIDE, colour_masks
from .score import only_palette

CLOSE = 3.0  # pixels from where a thing should be


class Goal(NamedTuple):
    """Prompts that leave something open, and what decides it."""

    prompts: list[str]
    loss: Callable[[Tensor], Tensor]  # of images [B, 3, H, W] in -1..1, or of crops, to [B]
    weight: float  # of the loss
    reached: Callable[[Tensor], Tensor]  # images in 0..1 to bool [B]


def colour_goal(count: int) -> Goal:
    """Things of no said colour; reached: the wanted colour and no other."""
    rng, names = random.Random(23), list(COLOURS)
    wanted = [names[i % len(names)] for i in range(count)]

    def reached(images: Tensor) -> Tensor:
        return torch.stack(
            [only_palette(images[b : b + 1], [name])[0] for b, name in enumerate(wanted)]
        )

    loss = colour_loss(*wanted)
    return Goal([f"a {rng.choice(SHAPES)} on gray" for _ in wanted], loss, 100.0, reached)


def place_goal(count: int) -> Goal:
    """Things of which no prompt says where; reached: the thing is there, nearer than `CLOSE`."""
    rng, names = random.Random(29), list(COLOURS)
    own = [names[i % len(names)] for i in range(count)]
    loss = place_loss([[rng.uniform(0.25 * SIDE, 0.75 * SIDE) for _ in "yx"] for _ in own])

    def reached(images: Tensor) -> Tensor:
        found = colour_masks(images)
        there = torch.stack([found[name][b].sum() >= PRESENT for b, name in enumerate(own)])
        return there & (loss(images * 2 - 1) < CLOSE)

    return Goal([f"a {name} {rng.choice(SHAPES)} on gray" for name in own], loss, 10.0, reached)


def colour_loss(*names: str) -> Callable[[Tensor], Tensor]:
    """How far the mean colour of what is not gray is from those named, in a picture or a crop."""
    wanted = _floats([COLOURS[name] for name in names]) * 2 - 1  # [B, 3]

    def loss(images: Tensor) -> Tensor:
        chroma = _chroma(images)
        mean = (chroma * images).sum((2, 3)) / chroma.sum((2, 3)).clamp(min=1e-6)
        return (mean - wanted).square().mean(1)

    return loss


def place_loss(places: Sequence[Sequence[float]]) -> Callable[[Tensor], Tensor]:
    """How many pixels the centre of what is not gray is from places, y and x of the picture."""
    wanted, axis = _floats(places), _floats(range(SIDE)) + 0.5  # [B, 2], [SIDE]

    def loss(images: Tensor) -> Tensor:
        chroma = _chroma(images)
        total = chroma.sum((1, 2, 3)).clamp(min=1e-6)
        centre = torch.stack([(chroma.sum((1, dim)) * axis).sum(1) / total for dim in (3, 2)], 1)
        return ((centre - wanted).square().sum(1) + 1e-6).sqrt()  # has a gradient at 0

    return loss


def _chroma(images: Tensor) -> Tensor:
    """How far each pixel is from gray, [B, 1, H, W]."""
    return images.amax(1, keepdim=True) - images.amin(1, keepdim=True)


def _floats(numbers: Sequence[Any]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


GOALS = {"colour": colour_goal, "place": place_goal}
