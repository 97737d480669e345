"""Images as masks and label maps: every mode, depth, palette, alpha and orientation of PIL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL")
pytest.importorskip("diffusers")

from PIL import Image, ImageOps

from dense_attn import Layout
from dense_attn.demo.scene import load_scene
from dense_attn.integrations.diffusers.regions import parse

REGION = np.zeros((6, 8), bool)
REGION[1:4, 2:7] = True
LABELS = np.zeros((6, 8), np.uint8)
LABELS[0:2, 1:5], LABELS[3:6, 2:8] = 1, 9
ORIENTATION = 0x112  # of EXIF
WHITE = Image.new("RGB", (8, 6), "white")
LIGHT = "have a mask of at least one pixel that is light and opaque, got none in an image of mode "


def mask(image: Image.Image) -> np.ndarray:
    return parse([("cat", image)], 1)[0].masks[0].numpy()


def grey(dark: float, light: float, dtype: str = "uint8") -> Image.Image:
    """An image of two values, the light one in the region."""
    return Image.fromarray(np.where(REGION, light, dark).astype(dtype))


def with_alpha(image: Image.Image, outside: int = 0, inside: int = 255) -> Image.Image:
    image = image.copy()
    image.putalpha(grey(outside, inside))
    return image


def of_palette(colours: list[int], **info: object) -> Image.Image:
    image = grey(0, 1)
    image.putpalette(colours)
    image.info |= info
    return image


def premultiplied_grey() -> Image.Image:
    """PIL makes this mode from a file's bytes alone."""
    return Image.frombytes(
        "La", (8, 6), np.repeat(np.where(REGION, 255, 0).astype(np.uint8), 2).tobytes()
    )


LIGHT_AND_OPAQUE: dict[str, Callable[[], Image.Image]] = {
    "white on a transparent outside, RGBA": lambda: with_alpha(WHITE),
    "white on a transparent outside, LA": lambda: with_alpha(WHITE.convert("L")),
    "white on a transparent outside, RGBa": lambda: with_alpha(WHITE).convert("RGBa"),
    "white on a transparent outside, La": premultiplied_grey,
    "white on a transparent outside, PA": lambda: with_alpha(of_palette([255] * 6)),
    "white palette, one transparent entry": lambda: of_palette([255] * 6, transparency=0),
    "white palette, alpha of each entry": lambda: of_palette(
        [255] * 6, transparency=bytes((100, 200))
    ),
    "a transparent colour, RGB": lambda: Image.merge("RGB", [grey(250, 255)] * 3),
    "a transparent value, L": lambda: grey(250, 255),
    "a transparent value, 1": lambda: grey(0, 255).convert("1"),
    "grey of half the light": lambda: with_alpha(grey(127, 128), 255),
    "white of half the alpha": lambda: with_alpha(WHITE, 127, 128),
    "light times alpha": lambda: with_alpha(grey(160, 200), 200, 200),
    "black outside that is opaque": lambda: with_alpha(grey(0, 255), 255),
    "16 bits": lambda: grey(20000, 40000, "uint16"),
    "16 bits, big-endian": lambda: Image.fromarray(np.where(REGION, 40000, 20000).astype(">u2")),
    "16 bits, the half": lambda: grey(32767, 32768, "uint16"),
    "16 bits, nearly black outside": lambda: grey(200, 65535, "uint16"),
    "16 bits with 8 in them": lambda: grey(127, 128, "uint16"),
    "16 bits with 12 in them": lambda: grey(1500, 4095, "uint16"),
    "32 bits": lambda: grey(20000, 40000, "int32"),
    "32 bits, all of them": lambda: grey(-5, 2**31 - 1, "int32"),
    "floats to 1": lambda: grey(0.49, 0.5, "float32"),
    "floats to 255": lambda: grey(100.0, 255.0, "float32"),
    "1": lambda: grey(0, 255).convert("1"),
    "L": lambda: grey(127, 128),
    "P": lambda: of_palette([0, 0, 0, 255, 255, 0]),
    "CMYK": lambda: Image.merge("RGB", [grey(60, 200)] * 3).convert("CMYK"),
    "YCbCr": lambda: Image.merge("RGB", [grey(60, 200)] * 3).convert("YCbCr"),
    "HSV": lambda: Image.merge("RGB", [grey(60, 200)] * 3).convert("HSV"),
    "LAB": lambda: Image.merge("LAB", [grey(60, 200), *[grey(128, 128)] * 2]),
}
TRANSPARENT = {
    "a transparent colour, RGB": (250,) * 3,
    "a transparent value, L": 250,
    "a transparent value, 1": 0,
}


@pytest.mark.parametrize("kind", LIGHT_AND_OPAQUE)
def test_a_mask_is_where_an_image_is_light_and_opaque(kind: str) -> None:
    image = LIGHT_AND_OPAQUE[kind]()
    if kind in TRANSPARENT:
        image.info["transparency"] = TRANSPARENT[kind]
    assert np.array_equal(mask(image), REGION)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "1", "I;16"])
def test_files_with_transparency(mode: str, tmp_path: Path) -> None:
    """PNG has these: a channel, or one entry, value or colour of the file, which is light here."""
    images = {
        "P": of_palette([255] * 6),
        "L": grey(250, 255),
        "RGB": Image.merge("RGB", [grey(250, 255)] * 3),
        "1": grey(0, 255).convert("1"),
        "I;16": grey(65000, 65535, "uint16"),
    }
    image = images.get(mode)
    if image is None:
        with_alpha(WHITE.convert(mode.removesuffix("A"))).save(tmp_path / "mask.png")
    else:
        transparent = {"P": 0, "L": 250, "RGB": (250,) * 3, "1": 0, "I;16": 65000}[mode]
        image.save(tmp_path / "mask.png", transparency=transparent)
    read = Image.open(tmp_path / "mask.png")
    assert read.mode == mode
    assert np.array_equal(mask(read), REGION)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (with_alpha(Image.new("RGB", (8, 6))), LIGHT + "RGBA"),
        (Image.new("L", (0, 4)), LIGHT + "L"),
        (grey(0, 127), LIGHT + "L"),
        (grey(0.0, np.nan, "float32"), "hold finite values, got others in an image of mode F"),
    ],
    ids=["black on a transparent outside", "no pixels", "dark", "nan"],
)
def test_masks_that_say_nothing_are_refused(image: Image.Image, sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"regions\[1\] must {sentence}"):
        parse([("cat", (0, 0, 1, 1)), ("dog", image)], 1)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_mask_is_named_before_the_boxes_on_its_grid(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"regions\[1\] must have a mask of at least one pixel"):
        parse([("cat", (0, 0, 1, 1)), ("dog", np.zeros(shape, bool))], 1)


@pytest.mark.parametrize("read", ["mask", "label map"])
def test_orientation_and_frames(read: str, tmp_path: Path) -> None:
    """An image lies as every viewer shows it, and only its first frame counts."""
    path, first = tmp_path / "my.png", Image.fromarray(np.where(REGION, 255, 0).astype(np.uint8))
    turned = first.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # shown with a quarter turn to the right

    def seen() -> np.ndarray:
        return (
            mask(Image.open(path)) if read == "mask" else load_scene(path).layout.masks[0].numpy()
        )

    turned.save(path, exif=exif)
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(Image.open(path))) > 0, REGION)
    assert np.array_equal(seen(), REGION)
    first.save(path, exif=b"Exif\0\0no exif")
    assert np.array_equal(seen(), REGION)
    first.save(path, save_all=True, append_images=[ImageOps.invert(first)])
    assert np.array_equal(seen(), REGION)


COLOURS = np.array(
    [[250] * 3, [10, 0, 0], *[[0] * 3] * 7, [200, 30, 30]], np.uint8
)  # of the labels 0, 1 and 9
VISIBLE = Image.fromarray(np.where(LABELS == 0, 0, 255).astype(np.uint8))
BLACK_IS_NOTHING = COLOURS * (np.arange(10)[:, None] > 0).astype(np.uint8)


def coloured(colours: np.ndarray, mode: str) -> Image.Image:
    return Image.fromarray(colours[LABELS]).convert(mode)


def hidden(image: Image.Image) -> Image.Image:
    image.putalpha(VISIBLE)
    return image


def indexed(entry: int, **info: object) -> Image.Image:
    """Labels whose background is an entry of the palette, in which all have one colour."""
    image = Image.fromarray(np.where(LABELS == 0, entry, LABELS).astype(np.uint8))
    image.putpalette([7] * 768)
    image.info |= info
    return image


LABEL_MAPS: dict[str, Callable[[], Image.Image]] = {
    "L": lambda: Image.fromarray(LABELS),
    "P": lambda: indexed(0),
    "P, a transparent entry": lambda: indexed(3, transparency=3),
    "P, alpha of each entry": lambda: indexed(3, transparency=bytes((255, 255, 255, 0))),
    "PA": lambda: hidden(indexed(3)),
    "LA": lambda: hidden(Image.fromarray(LABELS + 20)),
    "16 bits": lambda: Image.fromarray(LABELS.astype(np.uint16) * 7000),
    "16 bits past a byte": lambda: Image.fromarray(
        np.array([0, 300, *[0] * 7, 301], np.uint16)[LABELS]
    ),
    "32 bits": lambda: Image.fromarray(LABELS.astype(np.int32) * 2**24),
    "floats": lambda: Image.fromarray(LABELS.astype(np.float32) * 300),
    "RGB": lambda: coloured(BLACK_IS_NOTHING, "RGB"),
    "CMYK": lambda: coloured(BLACK_IS_NOTHING, "CMYK"),
    "RGBA": lambda: hidden(coloured(COLOURS, "RGB")),
}


@pytest.mark.parametrize("kind", LABEL_MAPS)
def test_label_maps_of_every_kind(kind: str, tmp_path: Path) -> None:
    image, path = LABEL_MAPS[kind](), tmp_path / "my.tiff"
    if image.mode == "PA":  # no format keeps it
        from dense_attn import _pixels

        masks = Layout.from_label_map(_pixels.labels("label_map", image)).masks
    else:
        if image.mode != "CMYK" and not kind.startswith(("floats", "32")):
            path = tmp_path / "my.png"
        image.save(
            path, **{name: image.info[name] for name in ("transparency",) if name in image.info}
        )
        masks = load_scene(path).layout.masks
    assert np.array_equal(masks, Layout.from_label_map(LABELS).masks)


def test_a_region_smaller_than_a_token_of_the_picture(tmp_path: Path) -> None:
    Image.fromarray(np.pad(np.ones((1, 1), np.uint8), ((1, 510), (1, 510)))).save(
        tmp_path / "my.png"
    )
    assert load_scene(tmp_path / "my.png").layout.query_regions(32, 32).nonzero().tolist() == [[0]]
