"""The canvas: what is painted, uploaded and typed, as labels."""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("diffusers")
pytest.importorskip("PIL")

from PIL import Image

from dense_attn.examples.app import canvas, pictures
from dense_attn.examples.app.refused import Refused
from dense_attn.integrations.diffusers.regions import parse


def some_labels() -> np.ndarray:
    """Every label once at least, in no rectangles."""
    return np.random.default_rng(0).integers(0, 33, (64, 64)).astype(np.uint8)


def test_labels_go_to_the_browser_and_back() -> None:
    labels = some_labels()
    assert (canvas.painted(canvas.paint(labels)) == labels).all()
    assert (canvas.unpacked(canvas.packed(labels)) == labels).all()
    assert not canvas.painted("").any()


@pytest.mark.parametrize("text", ["no base64!", base64.b64encode(b"few").decode(), 7])
def test_another_canvas_is_refused(text: object) -> None:
    with pytest.raises(Refused, match="the canvas must be 64 x 64 cells, got others"):
        canvas.painted(text)
    with pytest.raises(Refused, match="labels must be those of a 64 x 64 canvas"):
        canvas.unpacked(text)


def test_a_bomb_is_not_unpacked() -> None:
    import zlib

    bomb = base64.b64encode(zlib.compress(bytes(1 << 24))).decode()
    with pytest.raises(Refused, match="labels must be those of a 64 x 64 canvas"):
        canvas.unpacked(bomb)


def test_colours_are_told_apart() -> None:
    assert len(canvas.COLOURS) == len(set(canvas.COLOURS.values())) == 32


def test_a_label_map_is_uploaded(tmp_path: Path) -> None:
    """Colours in ascending order; the page's own keep their labels; sides need not be equal."""
    labels = some_labels()
    canvas.painting(labels, 3).save(tmp_path / "own.png")
    assert (canvas.read_upload(tmp_path / "own.png") == labels).all()
    pixels = np.zeros((100, 300, 3), dtype=np.uint8)
    pixels[:50, :150], pixels[50:, 150:] = (200, 0, 0), (0, 0, 7)
    Image.fromarray(pixels).save(tmp_path / "other.png")
    found = canvas.read_upload(tmp_path / "other.png")
    assert found[0, 0] == found[31, 31] == 2
    assert found[63, 63] == found[32, 32] == 1
    assert found[0, 63] == found[63, 0] == 0


def refused(path: Path) -> str:
    """The sentence with which an upload is refused."""
    with pytest.raises(Refused) as error:
        canvas.read_upload(path)
    assert error.value.field == "canvas"
    return str(error.value)


def test_uploads_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    Image.new("1", (10_000, 10)).save(path)
    assert refused(path) == "the label map must have at most 4096 pixels a side, got 10000 x 10"
    pixels = np.arange(33 * 4, dtype=np.uint8).reshape(1, 33, 4) // 4 + 1
    Image.fromarray(np.repeat(pixels[..., :3], 99, 0)).resize((990, 99), 0).save(path)
    assert refused(path) == "the label map must hold 1 to 32 colours besides black, got 33"
    Image.new("L", (8, 8)).save(path)
    assert "1 to 32 colours besides black, got 0" in refused(path)
    lost = np.zeros((512, 512), dtype=np.uint8)
    lost[0, 0], lost[100:200] = 1, 2
    Image.fromarray(lost).save(path)
    assert "regions that reach a point of a 64 x 64 grid, got 1 that do not" in refused(path)


@pytest.mark.parametrize("kind", ["png", "tiff", "bmp"])
def test_what_has_no_labels_is_refused(kind: str, tmp_path: Path) -> None:
    """No picture, one of fractions, and one whose palette is longer than Pillow takes."""
    path = tmp_path / f"map.{kind}"
    if kind == "png":
        path.write_bytes(b"no picture")
    elif kind == "tiff":
        Image.new("F", (64, 64), 0.5).save(path)
    else:
        Image.new("P", (64, 64)).save(path)
        data = bytearray(path.read_bytes())
        data[46:50] = (300).to_bytes(4, "little")  # the length of the palette
        path.write_bytes(data + bytes(4 * 44))
    rule = "be a picture of colours or whole numbers"
    assert refused(path) == f"the label map must {rule}, got map.{kind}"


def test_a_huge_label_map_is_refused_by_its_size(tmp_path: Path) -> None:
    """Pillow's own limit comes before the page's."""
    path = tmp_path / "map.png"
    Image.new("1", (13_400, 13_400)).save(path)
    assert refused(path) == "the label map must have at most 4096 pixels a side, got many more"
    with pytest.raises(Refused, match="the file must be an image of this page"):
        pictures.read_settings(path)


def test_boxes_are_typed() -> None:
    labels = canvas.read_boxes("1: 0 0.5 0.5 1\n\n 2 0.25,0,1,0.75")
    assert labels[63, 0] == labels[48, 31] == 1
    assert labels[0, 16] == labels[47, 63] == labels[40, 20] == 2
    assert labels[0, 15] == labels[63, 32] == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "boxes must have a line"),
        ("1: 0 0 1", "a box must be a line such as"),
        ("1: 0 0 x 1", "a box must be a line such as"),
        ("33: 0 0 1 1", "a colour in 1..32"),
        ("1: 0.5 0 0.5 1", "0 <= x0 < x1 <= 1"),
        ("1: 0 0 1 1.1", "0 <= y0 < y1 <= 1"),
        ("1: 0 0 0.001 1", "the centre of a cell"),
    ],
)
def test_wrong_boxes_are_refused(text: str, words: str) -> None:
    with pytest.raises(Refused) as error:
        canvas.read_boxes(text)
    assert words in str(error.value)


def test_a_rectangle_is_a_box_and_means_the_same_pixels() -> None:
    labels = canvas.read_boxes("1: 0 0.5 0.5 1\n2: 0.25 0 1 0.75")
    box, drawn = canvas.mask_of(labels, 2), canvas.mask_of(labels, 1)
    assert box == (0.25, 0.0, 1.0, 0.75)
    assert isinstance(drawn, np.ndarray)
    (of_box,) = parse([("a", box), ("b", drawn)], 1)
    assert (of_box.masks[0].numpy() == (labels == 2)).all()
