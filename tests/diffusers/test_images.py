"""The images that invert takes, of one size, opaque and in 8 bits, and its words for others."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import pipeline

from dense_attn.integrations.diffusers import invert, reconstruct

pytestmark = pytest.mark.usefixtures("one_thread")
COLOURS = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)


def picture(width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(COLOURS).resize((width, height))


def grey(dtype: type, *values: float) -> Image.Image:
    """A picture of depth, of 16 x 16 pixels."""
    return Image.fromarray(np.resize(np.array(values, dtype), (16, 16)))


def inverted(image: object) -> tuple[int, int]:
    """The width and height of what comes back, and no warning on the way."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = invert(pipeline("sd"), image, "a cat", num_inference_steps=1)
    return reconstruct(pipeline("sd"), found)[0].size


def values(image: object) -> torch.Tensor:
    """The U-Net's latents at the end of the way to the noise."""
    return invert(pipeline("sd"), image, "a cat", num_inference_steps=1).latents[0]


@pytest.mark.parametrize(
    ("image", "kind", "sentence"),
    [
        (
            [picture(16), picture(32)],
            ValueError,
            "image must hold pictures of one size, got 16 x 16 and 32 x 16$",
        ),
        (
            (picture(16, 18), picture(18, 16)),
            ValueError,
            "image must hold pictures of one size, got 16 x 18 and 18 x 16",
        ),
        (picture(16, 1), ValueError, "image must be of at least 2 x 2 pixels, got 16 x 1$"),
        (
            Image.new("RGB", (0, 16)),
            ValueError,
            "image must be of at least 2 x 2 pixels, got 0 x 16",
        ),
        (
            torch.rand(1, 3, 1, 16),
            ValueError,
            "image must be of at least 2 x 2 pixels, got 16 x 1$",
        ),
        (
            torch.rand(1, 3, 0, 16),
            ValueError,
            r"image must have shape \(B, 3, H, W\), got \(1, 3, 0, 16\)",
        ),
        (
            torch.rand(0, 3, 16, 16),
            ValueError,
            r"image must have shape \(B, 3, H, W\), got \(0, 3, 16, 16\)",
        ),
        (
            torch.rand(3, 16, 16),
            ValueError,
            r"image must have shape \(B, 3, H, W\), got \(3, 16, 16\)",
        ),
        (
            torch.rand(1, 4, 16, 16),
            ValueError,
            r"image must have shape \(B, 3, H, W\), got \(1, 4, 16, 16\)",
        ),
        (
            torch.rand(1, 16, 16, 3),
            ValueError,
            r"image must have shape \(B, 3, H, W\), got \(1, 16, 16, 3\)",
        ),
        (
            torch.full((1, 3, 16, 16), torch.nan),
            ValueError,
            "image must be a tensor of floats in 0..1, got nan",
        ),
        (
            2 * torch.rand(1, 3, 16, 16) - 1,
            ValueError,
            "image must be a tensor of floats in 0..1, got values from -0.99",
        ),
        (
            torch.ones(1, 3, 16, 16).bool(),
            TypeError,
            "image must be a tensor of floats in 0..1, got bool",
        ),
        (
            torch.ones(1, 3, 16, 16, dtype=torch.complex64),
            TypeError,
            "image must be a tensor of floats .* got complex64",
        ),
        (
            torch.ones(1, 3, 16, 16).to(torch.float8_e4m3fn),
            TypeError,
            "image must be a tensor of floats .*, got float8_e4",
        ),
        (
            torch.ones(1, 3, 16, 16, device="meta"),
            ValueError,
            "image must hold values, got a meta tensor",
        ),
        (
            torch.ones(1, 3, 16, 16).to_sparse(),
            TypeError,
            "image must be a strided tensor, got torch.sparse_coo",
        ),
        (COLOURS, TypeError, "image must be a PIL image, a list of them or a tensor, got ndarray$"),
        (
            [COLOURS],
            TypeError,
            "image must be a PIL image, a list of them or a tensor, got a list of ndarray$",
        ),
        (
            [torch.rand(3, 16, 16)] * 2,
            TypeError,
            "image must be a PIL image, a list .*, got a list of Tensor$",
        ),
        (
            [picture(), None],
            TypeError,
            "image must be a PIL image, a list .*, got a list of Image, NoneType$",
        ),
        (
            [],
            TypeError,
            "image must be a PIL image, a list of them or a tensor, got a list of nothing$",
        ),
        ("cat.png", TypeError, "image must be a PIL image, a list of them or a tensor, got str$"),
        (
            grey(np.uint16, 0, 60000),
            ValueError,
            "image must hold values in 0..255 where it is of mode I;16, .* 0 to 60000$",
        ),
        (
            grey(np.int32, -1, 200),
            ValueError,
            "image must hold values in 0..255 where it is of mode I, got values from -1",
        ),
        (
            grey(np.float32, 0, 1),
            ValueError,
            "image must hold values in 0..255 where it is of mode F, .* from 0 to 1$",
        ),
        (
            grey(np.float32, 0, np.nan),
            ValueError,
            "image must hold values in 0..255 where it is of mode F, got nan",
        ),
    ],
    ids=range(27),
)
def test_wrong_images_are_refused(image: object, kind: type, sentence: str) -> None:
    pipe, called = pipeline("sd"), []
    handle = pipe.text_encoder.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(kind, match=f"^{sentence}"):
        invert(pipe, image, "a cat", num_inference_steps=1)
    handle.remove()
    assert not called


@pytest.mark.parametrize(
    "image",
    [
        picture(),
        [picture(), picture().convert("L")],
        (picture(),),
        torch.rand(2, 3, 16, 24),
        torch.rand(1, 3, 16, 24).half(),
        Image.new("LAB", (24, 16)),
    ],
    ids=["picture", "list", "tuple", "tensor", "half", "lab"],
)
def test_right_images_are_taken_in_silence(image: object) -> None:
    assert inverted(image) == (24, 16)


@pytest.mark.parametrize(
    "image", [picture(25, 17), torch.rand(1, 3, 17, 25)], ids=["picture", "tensor"]
)
def test_sides_that_the_vae_has_not_are_said(image: object) -> None:
    """A latent is 2 x 2 pixels here."""
    text = (
        "image must have sides of multiples of 2 to be taken as it is, got 25 x 17: it is "
        "resized to 24 x 16$"
    )
    with pytest.warns(UserWarning, match=text) as caught:
        found = invert(pipeline("sd"), image, "a cat", num_inference_steps=1)
    assert found.latents[0].shape[2:] == (8, 12)
    assert [(one.filename, len(caught)) for one in caught] == [(__file__, 1)]


def test_depth_that_fits_in_8_bits_is_taken() -> None:
    levels = np.arange(256) % 256
    expected = values(grey(np.uint8, *levels))
    for dtype in (np.uint16, np.int32, np.float32):
        assert torch.equal(values(grey(dtype, *levels)), expected)
    assert torch.equal(values(grey(np.int32, 0, 1)), values(grey(np.uint8, 0, 1)))


def test_transparent_pixels_are_said() -> None:
    opaque, hole = picture().convert("RGBA"), picture().convert("RGBA")
    hole.putpixel((3, 4), (255, 0, 0, 0))
    palette = picture().convert("P")
    palette.info["transparency"] = palette.getpixel((0, 0))
    assert inverted(opaque) == (24, 16)
    for image in (hole, hole.convert("LA"), palette, [picture(), hole]):
        with pytest.warns(
            UserWarning, match="image must be opaque to be taken as it looks, got transparent"
        ) as caught:
            invert(pipeline("sd"), image, "a cat", num_inference_steps=1)
        assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match="opaque"):
        assert torch.equal(values(hole), values(hole.convert("RGB")))
