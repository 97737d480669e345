"""The canvas: brush colours and a grid of labels, as pictures, uploads, typed boxes and text."""

from __future__ import annotations

import base64
import binascii
import colorsys
import re
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dense_attn import _pixels

from .refused import Refused, refuse

if TYPE_CHECKING:
    from PIL import Image

GRID = 64  # cells of a side: the finest grid of image tokens that most models attend on
MOST_PIXELS = 4096  # of a side of what is uploaded
PAINTED = {  # told apart by eyes of every kind
    "vermilion": "#d55e00", "blue": "#0072b2", "green": "#009e73", "yellow": "#f0e442",
    "sky": "#56b4e9", "pink": "#cc79a7", "orange": "#e69f00", "brown": "#6b4226",
}  # fmt: skip
MOST = 32  # regions of a layout
Mask = tuple[float, float, float, float] | np.ndarray


def _more(index: int) -> str:
    """A colour for the labels of uploads that have more than brushes."""
    hue, light = index * 0.381966 % 1.0, (0.3, 0.45, 0.75)[index % 3]
    return "#" + "".join(f"{round(255 * x):02x}" for x in colorsys.hls_to_rgb(hue, light, 0.9))


COLOURS: dict[str, str] = PAINTED | {
    f"colour {label}": _more(label) for label in range(len(PAINTED) + 1, MOST + 1)
}
_RGB = np.array([[int(code[i : i + 2], 16) for i in (1, 3, 5)] for code in COLOURS.values()])


def empty() -> np.ndarray:
    """The labels of a canvas on which nothing is painted, uint8 [64, 64]."""
    return np.zeros((GRID, GRID), dtype=np.uint8)


def painted(text: object) -> np.ndarray:
    """The labels of a painted canvas, which are bytes in base64 as `canvas.js` has them."""
    if not text:
        return empty()
    try:
        found = np.frombuffer(base64.b64decode(str(text), validate=True), np.uint8)
        labels = found.reshape(GRID, GRID)
    except ValueError:
        refuse("canvas", "the canvas", f"be {GRID} x {GRID} cells", "others")
    if labels.max() > MOST:
        refuse("canvas", "the canvas", f"have colours in 0..{MOST}", labels.max())
    return labels


def paint(labels: np.ndarray) -> str:
    """The inverse of `painted`."""
    return base64.b64encode(labels.tobytes()).decode()


def painting(labels: np.ndarray, cell: int = 1) -> Image.Image:
    """Labels [H, W] as a picture of their colours, transparent where nothing is."""
    from PIL import Image

    table = np.zeros((MOST + 1, 4), dtype=np.uint8)
    table[1:, :3], table[1:, 3] = _RGB, 255
    pixels = table[labels].repeat(cell, 0).repeat(cell, 1)
    return Image.fromarray(pixels, "RGBA")


def read_upload(path: str | Path) -> np.ndarray:
    """The labels of a label map's picture: its colours, or grey values, in ascending order.

    Brush colours keep their places. Black and what is transparent are bare.
    """
    from PIL import Image

    size = f"have at most {MOST_PIXELS} pixels a side"
    try:
        with Image.open(path) as image:
            if max(image.size) > MOST_PIXELS:
                refuse("canvas", "the label map", size, "{} x {}".format(*image.size))
            found = _pixels.labels("the label map", image)
    except Refused:
        raise
    except Image.DecompressionBombError:  # before its size is known
        refuse("canvas", "the label map", size, "many more")
    except (ValueError, SyntaxError, OSError):
        rule = "be a picture of colours or whole numbers"
        refuse("canvas", "the label map", rule, Path(path).name)
    rows, columns = (
        ((np.arange(GRID) + 0.5) * extent / GRID).astype(int) for extent in found.shape
    )
    cells, values = found[rows][:, columns], np.unique(found[found != 0])
    if not 1 <= len(values) <= MOST:
        rule = f"hold 1 to {MOST} colours besides black"
        refuse("canvas", "the label map", rule, len(values))
    lost = len(set(values) - set(cells.flat))
    if lost:
        rule = f"have regions that reach a point of a {GRID} x {GRID} grid"
        refuse("canvas", "the label map", rule, f"{lost} that do not")
    known = {int(r) << 16 | int(g) << 8 | int(b): i for i, (r, g, b) in enumerate(_RGB, 1)}
    brushes = all(int(value) in known for value in values)
    numbers = {value: known[int(value)] if brushes else i for i, value in enumerate(values, 1)}
    return np.vectorize(lambda value: numbers.get(value, 0), otypes=[np.uint8])(cells)


BOX = re.compile(r"\s*(\d+)\s*[: ]\s*" + r"[,\s]+".join([r"([-+.\de]+)"] * 4) + r"\s*")


def read_boxes(text: str) -> np.ndarray:
    """The labels of typed boxes, a line each: `colour: x0 y0 x1 y1` in fractions of the canvas.

    A cell belongs to the last box that holds its centre.
    """
    labels, centres = empty(), (np.arange(GRID) + 0.5) / GRID
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        refuse("canvas", "boxes", "have a line such as 1: 0 0.3 0.5 1", "none")
    for line in lines:
        found = BOX.fullmatch(line)
        try:
            label, box = int(found[1]), [float(number) for number in found.groups()[1:]]
        except (TypeError, ValueError):
            refuse("canvas", "a box", "be a line such as 1: 0 0.3 0.5 1", repr(line.strip()))
        x0, y0, x1, y1 = box
        if not (1 <= label <= MOST and 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            rule = f"have a colour in 1..{MOST} and 0 <= x0 < x1 <= 1, 0 <= y0 < y1 <= 1"
            refuse("canvas", "a box", rule, repr(line.strip()))
        inside = ((y0 <= centres) & (centres < y1))[:, None] & (x0 <= centres) & (centres < x1)
        if not inside.any():
            rule = f"hold the centre of a cell of the {GRID} x {GRID} canvas"
            refuse("canvas", "a box", rule, repr(line.strip()))
        labels[inside] = label
    return labels


def mask_of(labels: np.ndarray, label: int) -> Mask:
    """The region of a label: a box where it is one, else a bool array [64, 64]."""
    mask = labels == label
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    if mask[y0:y1, x0:x1].all():
        return tuple(float(edge) / GRID for edge in (x0, y0, x1, y1))
    return mask


def packed(labels: np.ndarray) -> str:
    """Labels as text, which `unpacked` and two lines of Python read."""
    return base64.b64encode(zlib.compress(labels.tobytes(), 9)).decode()


def unpacked(text: Any) -> np.ndarray:
    """The inverse of `packed`."""
    try:
        reader = zlib.decompressobj()  # which makes no more of a text than a canvas has
        data = reader.decompress(base64.b64decode(text, validate=True), GRID * GRID + 1)
        labels = np.frombuffer(data, np.uint8).reshape(GRID, GRID)
    except (TypeError, ValueError, binascii.Error, zlib.error):
        refuse("file", "labels", f"be those of a {GRID} x {GRID} canvas", "others")
    if labels.max() > MOST:
        refuse("file", "labels", f"be in 0..{MOST}", labels.max())
    return labels
