"""Spectral-residual saliency finds what does not belong, and boxes are those defined."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dense_attn import spectral_residual_saliency
from dense_attn.optimize.saliency import salient_boxes, salient_crop


def odd_patch(size: int, top: int, left: int, seed: int) -> tuple[Tensor, int]:
    """An image of upright stripes with noise and a square of level ones, and the square's side."""
    noise = 0.05 * torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    stripes = 0.5 + 0.3 * torch.sin(torch.arange(size) * torch.pi / 4)
    texture = stripes.expand(size, size).clone()
    side = 3 * size // 16
    texture[top : top + side, left : left + side] = stripes[:, None].expand(size, size)[
        :side, :side
    ]
    return (texture + noise).clamp(0, 1).expand(1, 3, size, size).clone(), side


@pytest.mark.parametrize("size", [64, 128, 256])
@pytest.mark.parametrize(("top", "left"), [(0.2, 0.6), (0.5, 0.1), (0.65, 0.7)])
def test_the_peak_lies_in_the_odd_patch(size: int, top: float, left: float) -> None:
    y, x = int(top * size), int(left * size)
    image, side = odd_patch(size, y, x, seed=0)
    peak = divmod(spectral_residual_saliency(image).argmax().item(), size)
    blur = round(2.5 * size / 64)  # so far a peak may lie beyond the edge that it stems from
    assert y - blur <= peak[0] < y + side + blur
    assert x - blur <= peak[1] < x + side + blur


def by_definition(image: Tensor) -> Tensor:
    """The paper's formula on 64 x 64 pixels, with log amplitude, phase and sums written out."""
    red, green, blue = image.double().unbind(1)
    grey = 0.299 * red + 0.587 * green + 0.114 * blue
    spectrum = torch.fft.fft2(grey)
    amplitude, phase = spectrum.abs().log(), spectrum.angle()
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    mean = torch.stack([amplitude.roll(shift, (1, 2)) for shift in shifts]).mean(0)
    energy = torch.fft.ifft2(torch.polar((amplitude - mean).exp(), phase)).abs().square()
    offsets = torch.arange(-8, 9).double()
    kernel = torch.exp(-(offsets**2) / (2 * 2.5**2))
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    blurred = F.conv2d(energy[:, None], kernel[None, None], padding=8)[:, 0]
    low, high = blurred.amin((1, 2), keepdim=True), blurred.amax((1, 2), keepdim=True)
    return (blurred - low) / (high - low)


def test_is_the_formula() -> None:
    image = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(
        spectral_residual_saliency(image.double()), by_definition(image), rtol=0, atol=1e-10
    )
    torch.testing.assert_close(
        spectral_residual_saliency(image).double(), by_definition(image), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (33, 50), (96, 64)])
def test_range_shape_and_dtype(size: tuple[int, int], dtype: torch.dtype) -> None:
    image = torch.rand(2, 3, *size).to(dtype).requires_grad_()
    saliency = spectral_residual_saliency(image)
    assert saliency.shape == (2, *size)
    assert saliency.dtype == dtype
    assert not saliency.requires_grad
    if size != (1, 1):
        assert saliency.amin((1, 2)).eq(0).all()
        assert saliency.amax((1, 2)).eq(1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    image = torch.rand(1, 3, 96, 64).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = spectral_residual_saliency(image)
    assert torch.equal(inside, spectral_residual_saliency(image))


def test_images_of_a_batch_do_not_mix() -> None:
    image = torch.stack(
        [odd_patch(128, 20 * i, 30, seed=i)[0][0] * 0.3 * (i + 1) for i in range(3)]
    )
    alone = torch.cat([spectral_residual_saliency(one[None]) for one in image])
    torch.testing.assert_close(spectral_residual_saliency(image), alone, rtol=0, atol=1e-5)
    assert spectral_residual_saliency(image[:0]).shape == (0, 128, 128)


def test_a_turned_image_has_a_turned_map() -> None:
    image = torch.rand(1, 3, 128, 96, dtype=torch.float64)
    saliency = spectral_residual_saliency(image)
    torch.testing.assert_close(spectral_residual_saliency(image.mT), saliency.mT)
    torch.testing.assert_close(spectral_residual_saliency(image.flip(3)), saliency.flip(2))
    assert (saliency - saliency.flip(2)).abs().max() > 0.1


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.3, 0.7, 0.1)])
def test_a_constant_image_has_a_map_of_zeros(colour: tuple[float, float, float]) -> None:
    image = torch.tensor(colour)[None, :, None, None].expand(1, 3, 90, 70)
    assert not spectral_residual_saliency(image).any()
    assert spectral_residual_saliency(torch.cat([image, torch.rand(1, 3, 90, 70)]))[1].max() == 1


REFUSALS = {
    "image must be a tensor, got list": (TypeError, lambda: spectral_residual_saliency([[0.0]])),
    "image must be one of float32, bfloat16, float16, float64, got uint8": (
        TypeError,
        lambda: spectral_residual_saliency(torch.ones(1, 3, 4, 4, dtype=torch.uint8)),
    ),
    "image must have shape [batch, 3, height, width], got (3, 4, 4)": (
        ValueError,
        lambda: spectral_residual_saliency(torch.ones(3, 4, 4)),
    ),
    "image must have shape [batch, 3, height, width], got (1, 1, 4, 4)": (
        ValueError,
        lambda: spectral_residual_saliency(torch.ones(1, 1, 4, 4)),
    ),
    "image must have shape [batch, 3, height, width], got (1, 3, 0, 4)": (
        ValueError,
        lambda: spectral_residual_saliency(torch.ones(1, 3, 0, 4)),
    ),
    "image must hold numbers, got a meta tensor": (
        ValueError,
        lambda: spectral_residual_saliency(torch.ones(1, 3, 4, 4, device="meta")),
    ),
    "image must be from 0 to 1, got -1.0": (
        ValueError,
        lambda: spectral_residual_saliency(-torch.ones(1, 3, 4, 4)),
    ),
    "image must be from 0 to 1, got 1.5": (
        ValueError,
        lambda: spectral_residual_saliency(1.5 * torch.ones(1, 3, 4, 4)),
    ),
    "image must be from 0 to 1, got nan": (
        ValueError,
        lambda: spectral_residual_saliency(torch.nan * torch.ones(1, 3, 4, 4)),
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message: str) -> None:
    error, call = REFUSALS[message]
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def spot(height: int, width: int, *pixels: tuple[int, int]) -> Tensor:
    saliency = torch.zeros(1, height, width)
    for y, x in pixels:
        saliency[0, y, x] = 1.0
    return saliency


BOXES: dict[str, tuple[Tensor, tuple[int, int, int, int]]] = {
    "two corners": (spot(20, 30, (3, 5), (12, 25)), (3, 13, 5, 26)),
    "widened to 4 pixels": (spot(20, 30, (9, 15)), (8, 12, 14, 18)),
    "widened at the border": (spot(20, 30, (0, 29)), (0, 4, 26, 30)),
    "widened to 1/8 of a side": (spot(80, 160, (40, 80)), (36, 46, 71, 91)),
    "no larger than the image": (spot(3, 2, (1, 1)), (0, 3, 0, 2)),
    "all equal": (torch.full((1, 7, 9), 0.1), (0, 7, 0, 9)),
    "halfway is salient, less is not": (
        torch.tensor([[[0.0] * 12 + [0.6] * 4 + [0.7] * 3 + [1.0]]]),
        (0, 1, 16, 20),
    ),
}


@pytest.mark.parametrize("name", BOXES)
def test_boxes(name: str) -> None:
    saliency, expected = BOXES[name]
    assert salient_boxes(saliency) == [expected]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.integers(0, 2**31),
    st.floats(0.01, 100),
    st.floats(-10, 10),
)
def test_a_box_holds_what_is_salient_whatever_the_maps_scale(
    height: int, width: int, seed: int, factor: float, constant: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(2, height, width, generator=generator, dtype=torch.float64) ** 8
    boxes = salient_boxes(saliency)
    assert salient_boxes(factor * saliency + constant) == boxes
    for one, (top, bottom, left, right) in zip(saliency, boxes):
        y, x = (one >= (one.mean() + one.max()) / 2).nonzero().unbind(1)
        assert 0 <= top <= y.min() <= y.max() < bottom <= height
        assert 0 <= left <= x.min() <= x.max() < right <= width
        assert (bottom - top == y.max() - y.min() + 1) or bottom - top == min(
            height, max(4, round(height / 8))
        )
        assert (right - left == x.max() - x.min() + 1) or right - left == min(
            width, max(4, round(width / 8))
        )


def test_the_crop_is_the_box_resized_and_differentiable() -> None:
    image = torch.randn(2, 3, 16, 12, dtype=torch.float64, requires_grad=True)
    saliency = torch.zeros(2, 16, 12)
    saliency[0, 4:12, 0:6] = 1.0
    crop = salient_crop(image, saliency)
    assert torch.equal(crop[1], image[1])  # a map without a maximum: the whole image
    half, three_quarters = image[0, :, 4:6, 0:2], torch.tensor([0.75, 0.25], dtype=torch.float64)
    # Pixel (1, 1): a quarter of the way.
    by_hand = torch.einsum("cyx,y,x->c", half, three_quarters, three_quarters)
    torch.testing.assert_close(crop[0, :, 1, 1], by_hand)
    (gradient,) = torch.autograd.grad(crop[0].sum(), image)
    inside = torch.zeros(2, 16, 12, dtype=torch.bool)
    inside[0, 4:12, 0:6] = True
    assert torch.equal(gradient.abs().amax(1) > 0, inside)
    torch.testing.assert_close(gradient.sum(), crop[0].new_tensor(float(crop[0].numel())))
