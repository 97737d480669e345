"""Scenes of one to three coloured shapes: drawn, put into words, and found in images."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

import torch
from torch import Tensor

SIDE = 32  # pixels
COLOURS = {
    "red": (1.0, 0.0, 0.0), "orange": (1.0, 0.5, 0.0), "yellow": (1.0, 1.0, 0.0),
    "green": (0.0, 1.0, 0.0), "cyan": (0.0, 1.0, 1.0), "blue": (0.0, 0.0, 1.0),
    "magenta": (1.0, 0.0, 1.0),
}  # fmt: skip
BACKGROUNDS = {"gray": (0.5, 0.5, 0.5), "white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
SHAPES = ("circle", "square", "triangle")
# area and centre of mass of radius 1
SOLID = {"circle": (3.14, 0.0), "square": (3.03, 0.0), "triangle": (1.62, 0.2)}
RADII = {"small": (3.5, 5.0), "": (5.0, 8.0), "large": (7.5, 9.5)}
WORDS = ("a", "and", "on", "small", "large", *COLOURS, *SHAPES, *BACKGROUNDS, "thing")
# a pixel this close to a colour of the palette is of that colour; the closest two are 0.5 apart
NEAR = 0.24
PRESENT = 10  # pixels of an object that is there; the smallest that is drawn has about 16
HELD_OUT = (
    4  # pairs of coloured shapes whose hash is a multiple of it are in no training scene: 39 of 189
)


@dataclass(frozen=True)
class Thing:
    """A coloured shape: centre and radius in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float
    size: str = ""  # "small", "large" or not said

    @property
    def phrase(self) -> str:
        """The thing as a caption names it."""
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """Things and what they lie on."""

    things: tuple[Thing, ...]
    background: str = "gray"

    @property
    def phrases(self) -> list[str]:
        """The phrases of the things, in the caption's order."""
        return [thing.phrase for thing in self.things]

    @property
    def caption(self) -> str:
        """All that there is."""
        return caption(self.phrases, self.background)


def caption(phrases: Sequence[str], background: str = "") -> str:
    """Phrases and ground of a caption that leaves something open, for an edit to decide."""
    ground = [f"on {background}"] if background else []
    return " ".join([" and ".join(phrases), *ground]).strip()


def left_out(rng: random.Random, scene: Scene) -> tuple[list[str], str]:
    """Phrases and ground of a caption that leaves something open, which an edit may decide."""
    if rng.random() < 0.1:
        return [], scene.background
    phrases = []
    for thing in scene.things:
        size, colour, shape = (rng.random() < share for share in (0.5, 0.2, 0.2))
        if rng.random() < 0.7:
            said = replace(
                thing, size="" if size else thing.size, shape="thing" if shape else thing.shape
            )
            phrases.append(replace(said, colour="" if colour else thing.colour).phrase)
    return phrases, scene.background if rng.random() < 0.5 else ""


def held_out(first: Thing, second: Thing) -> bool:
    """Whether a pair of coloured shapes is kept out of training, in either order."""
    names = sorted(f"{thing.colour} {thing.shape}" for thing in (first, second))
    return zlib.crc32(", ".join(names).encode()) % HELD_OUT == 0


def draw_scene(
    rng: random.Random,
    count: int,
    unseen: bool | None = None,
    colours: Sequence[str] = (),
    touching: bool = False,
) -> Scene:
    """A scene of things of different colours.

    Args:
        rng: where it is drawn from.
        count: of its things, 1 to 3.
        unseen: whether pairs of it were kept out of training; None: either.
        colours: what its things are painted with; none: any.
        touching: the circle around each overlaps that of the one before by 1 or 2 pixels; otherwise
            there is room.
    """
    while True:
        palette = rng.sample(list(colours) or list(COLOURS), count)
        things = [_draw_thing(rng, colour, count) for colour in palette]
        gaps = [_gap(*pair) for pair in combinations(things, 2)]
        neighbours = [_gap(*pair) for pair in pairwise(things)]
        if min(gaps, default=1.0) < (-2 if touching else 1) or (
            touching and max(neighbours, default=-1.0) > -1
        ):
            continue
        if unseen is None or any(held_out(*pair) for pair in combinations(things, 2)) == unseen:
            background = rng.choices(list(BACKGROUNDS), (2, 1, 1))[0]
            return Scene(tuple(things), background)


def _draw_thing(rng: random.Random, colour: str, count: int) -> Thing:
    size = rng.choices(list(RADII), (1, 4, 1))[0]
    low, high = RADII[size]
    room = 11 - 1.5 * count  # larger things of a crowd would touch
    radius = rng.uniform(min(low, room - 1), min(high, room))
    x, y = (rng.uniform(radius, SIDE - radius) for _ in range(2))
    return Thing(colour, rng.choice(SHAPES), x, y, radius, size)


def _gap(a: Thing, b: Thing) -> float:
    """Pixels between the circles around them."""
    return ((a.x - b.x) ** 2 + (a.y - b.y) ** 2) ** 0.5 - a.radius - b.radius


def render(scenes: Sequence[Scene]) -> Tensor:
    """Images [B, 3, 32, 32] in 0..1, edges smooth."""
    images = _floats([BACKGROUNDS[scene.background] for scene in scenes])[:, :, None, None]
    images = images.expand(-1, -1, SIDE, SIDE).clone()
    for layer in range(max(len(scene.things) for scene in scenes)):
        rows = [b for b, scene in enumerate(scenes) if layer < len(scene.things)]
        things = [scenes[b].things[layer] for b in rows]
        cover = _cover(things)[:, None]
        colour = _floats([COLOURS[thing.colour] for thing in things])[:, :, None, None]
        images[rows] = images[rows] * (1 - cover) + colour * cover
    return images


def masks(scene: Scene) -> Tensor:
    """The pixels of each thing that no later one hides, bool [R, 32, 32]."""
    cover = _cover(scene.things) > 0.5
    hidden = cover.flip(0).cumsum(0).flip(0) - cover.long() > 0
    return cover & ~hidden


def _cover(things: Sequence[Thing]) -> Tensor:
    """How much of each pixel a thing covers, [R, 32, 32]."""
    centres = _floats(range(SIDE)) + 0.5
    x, y, radius = (
        _floats([getattr(t, name) for t in things])[:, None, None] for name in ("x", "y", "radius")
    )
    dx, dy = centres[None, None, :] - x, centres[None, :, None] - y
    outside = {
        "circle": (dx.square() + dy.square()).sqrt() - radius,
        "square": torch.maximum(dx.abs(), dy.abs()) - 0.87 * radius,
        "triangle": torch.maximum(
            dy - 0.8 * radius, 0.894 * dx.abs() - 0.447 * dy - 0.447 * radius
        ),
    }
    signed = torch.stack([outside[thing.shape][i] for i, thing in enumerate(things)])
    return (0.5 - signed).clamp(0, 1)


def _floats(values: Sequence) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def colour_masks(images: Tensor) -> dict[str, Tensor]:
    """The pixels [B, H, W] of images [B, 3, H, W] in 0..1 of each colour, to `NEAR`."""
    palette = _floats(list((COLOURS | BACKGROUNDS).values()))
    difference = images[:, None] - palette[None, :, :, None, None]  # [B, P, 3, H, W]
    distance = difference.square().sum(2).sqrt()
    nearest, near = distance.argmin(1), distance.amin(1) < NEAR
    return {name: near & (nearest == p) for p, name in enumerate(COLOURS | BACKGROUNDS)}


def shape_of(mask: Tensor) -> str:
    """The shape that, with the area and centre of a mask [H, W], overlaps most with it."""
    area = mask.sum().float()
    y, x = (float(places.float().mean() + 0.5) for places in mask.nonzero(as_tuple=True))
    overlaps = {}
    for shape, (full, below) in SOLID.items():
        radius = float((area / full).sqrt())
        (ideal,) = _cover([Thing("", shape, x, y - below * radius, radius)]) > 0.5
        overlaps[shape] = (mask & ideal).sum().float() / (mask | ideal).sum()
    return max(overlaps, key=overlaps.get)
