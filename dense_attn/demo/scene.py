"""A label map image and its phrases as the demo's scene, or a sentence that says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np

from dense_attn import _pixels
from dense_attn._command import UserError
from dense_attn.demo.step import NUM_TOKENS
from dense_attn.layout_attention.layout import Layout

# of examples/scene.png
SHIPPED_PHRASES = ("a green hill", "an oak tree", "a red balloon", "a grey cat")
PICTURE_GRID = 32


@dataclass(frozen=True)
class Scene:
    """A layout with its phrases and the prompt they make."""

    layout: Layout
    phrases: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The phrases in one sentence."""
        return "a photo of " + ", ".join(self.phrases)


def load_scene(path: Path | None = None, phrases: list[str] | None = None) -> Scene:
    """The scene of a label map image, by default the shipped one; a UserError says why it is none.

    Palette and greyscale values are the labels, of any depth; in a colour image every distinct
    colour is a label, and black is 0. What is transparent is 0, too. Label 0 is the background. A
    word of a phrase stands for one token of the prompt.
    """
    if path is None:
        path = Path(str(resources.files("dense_attn.examples") / "scene.png"))
        phrases = phrases or list(SHIPPED_PHRASES)
    try:
        num_regions = len(Layout.from_label_map(labels := _read_labels(path)))
    except ValueError as error:
        raise UserError(f"{path} is not a usable layout: {error}") from None
    phrases = phrases or [f"region {r + 1}" for r in range(num_regions)]
    if len(phrases) != num_regions or not all(phrase.split() for phrase in phrases):
        raise UserError(
            f"--phrases must name each of the {num_regions} regions of {path}, got {phrases}"
        )
    layout = Layout.from_label_map(labels, _spans(phrases))
    if layout.spans[-1][1] >= NUM_TOKENS:
        got = layout.spans[-1][1] + 1
        raise UserError(f"--phrases must fit into a prompt of {NUM_TOKENS} tokens, got {got}")
    return Scene(layout, tuple(phrases))


def _spans(phrases: list[str]) -> list[tuple[int, int]]:
    """The place of each phrase in <start> a photo of <phrases> <end>, one token a word."""
    spans, start = [], len(("<start>", "a", "photo", "of"))
    for phrase in phrases:
        spans.append((start, start + len(phrase.split())))
        start = spans[-1][1]
    return spans


def _read_labels(path: Path) -> np.ndarray:
    """The integer labels [H, W] of an image file."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise UserError("the demo needs pillow: pip install dense_attn[bench]") from None
    try:
        image = Image.open(path)
        image.load()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        raise UserError(f"{path} is not an image that can be read") from None
    return _pixels.labels("label_map", image)
