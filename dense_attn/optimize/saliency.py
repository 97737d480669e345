"""Where an image draws the eye: spectral-residual saliency, and the crop around what is salient."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from dense_attn import _checks

LUMA = (0.299, 0.587, 0.114)
WORKING_SIDE = 64  # the paper's scale: at which a person sees an image at a glance
BLUR_SIGMA = 2.5  # pixels of an image whose longer side is WORKING_SIDE
# of the largest possible amplitude; below lies rounding error, which the residual would blow up
FLOOR = 1e-6
CONSTANT = 1e-6  # grey values that differ by no more are one
SMALLEST_BOX = 4  # pixels
SMALLEST_SHARE = 1 / 8  # of a side

Box = tuple[int, int, int, int]  # top, bottom, left, right


def spectral_residual_saliency(image: Tensor) -> Tensor:
    """How much each pixel of an image stands out, from what is unusual in the image's spectrum.

    With `A` and `P` the amplitude and phase of the Fourier transform of the grey image, its longer
    side scaled down to 64 pixels (never up), the map is
    `blur(|ifft(exp(log A - mean_3x3(log A) + i P))|^2)`, a Gaussian blur of 2.5 pixels, resized
    back and scaled to 0..1 in each image on its own; an image of one grey has a map of zeros.

    Args:
        image: `[B, 3, H, W]` in 0..1; float32, bfloat16, float16 or float64. Computed in float32
            (float64 for float64), also under autocast, without gradients.

    Returns:
        The map, `[B, H, W]` in 0..1, of the image's dtype.

    Raises:
        ValueError, TypeError: the image breaks the rule that the message names.

    Source: Hou and Zhang, Saliency Detection: A Spectral Residual Approach, CVPR 2007.

    Example:
        >>> import torch, dense_attn
        >>> image = torch.arange(64).remainder(4).div(4).expand(1, 3, 64, 64).clone()  # stripes
        >>> image[:, :, 40:48, 8:16] = 0.9  # and what does not belong
        >>> peak = dense_attn.spectral_residual_saliency(image).argmax().item()
        >>> peak // 64 in range(40, 48), peak % 64 in range(8, 16)
        (True, True)
    """
    _checks.floats("image", image)
    if image.dim() != 4 or image.shape[1] != 3 or 0 in image.shape[2:]:
        _checks.refuse("image", "have shape [batch, 3, height, width]", tuple(image.shape))
    _checks.readable("image", image, "numbers")
    inside = (image >= 0) & (image <= 1)
    if not inside.all():
        _checks.refuse("image", "be from 0 to 1", image[~inside][0].item())
    if len(image) == 0:
        return image.new_zeros((0, *image.shape[2:]))
    with torch.no_grad(), _autocast_off(image.device.type):
        return _spectral_residual(image).to(image.dtype)


def _autocast_off(device: str) -> AbstractContextManager[object]:
    """Autocast would round the grey image and the blur to its own dtype."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _spectral_residual(image: Tensor) -> Tensor:
    wide = torch.promote_types(image.dtype, torch.float32)
    luma = image.new_tensor(LUMA, dtype=wide)
    grey = torch.einsum("bchw,c->bhw", image.to(wide), luma)  # [B, H, W]
    height, width = grey.shape[1:]
    longer = max(height, width)
    side = min(WORKING_SIDE, longer)
    size = max(1, round(side * height / longer)), max(1, round(side * width / longer))
    # Means of boxes: any other filter would make the borders stand out.
    small = F.adaptive_avg_pool2d(grey, size)
    spectrum = torch.fft.fft2(small)
    log_amplitude = spectrum.abs().clamp_min(FLOOR * size[0] * size[1]).log()
    # F exp(-mean) is exp(log A - mean + i P), and damps what lies below the floor. A spectrum is
    # periodic.
    padded = F.pad(log_amplitude[:, None], (1, 1, 1, 1), mode="circular")
    mean = F.avg_pool2d(padded, 3, stride=1)[:, 0]
    energy = torch.fft.ifft2(spectrum * torch.exp(-mean)).abs().square()
    blurred = _blurred(energy, BLUR_SIGMA * side / WORKING_SIDE)
    raw = _enlarged(blurred[:, None], (height, width))[:, 0]
    low, high = raw.amin((1, 2), keepdim=True), raw.amax((1, 2), keepdim=True)
    constant = grey.amax((1, 2), keepdim=True) - grey.amin((1, 2), keepdim=True) <= CONSTANT
    scaled = (raw - low) / (high - low).clamp_min(torch.finfo(wide).tiny)
    return torch.where(constant, 0.0, scaled).clamp(0, 1)


def _enlarged(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _blurred(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur of [B, H, W] in zeros: the seam of the periodic spectrum stands out less."""
    radius = max(1, round(3 * sigma))
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = kernel / kernel.sum()
    columns = F.conv2d(x[:, None], kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return F.conv2d(columns, kernel.view(1, 1, 1, -1), padding=(0, radius))[:, 0]


def salient_boxes(saliency: Tensor) -> list[Box]:
    """Boxes of the pixels halfway or more from a map's mean to its maximum, one a map of [B, H, W].

    So neither a factor on a map nor a constant added to it changes its box, a map that is the same
    everywhere gives the whole image, and no box is empty; at least 4 pixels and 1/8 of each side,
    as far as the image has them.
    """
    high = saliency.amax((1, 2), keepdim=True)
    halfway = (saliency.mean((1, 2), keepdim=True) + high) / 2
    threshold = torch.minimum(halfway, high)  # a mean may round above it
    salient = saliency >= threshold
    return [(*_span(one.any(1)), *_span(one.any(0))) for one in salient]


def _span(salient: Tensor) -> tuple[int, int]:
    """The first to the last salient line, widened evenly within the image to the smallest box."""
    lines, total = salient.nonzero(), len(salient)
    start, stop = int(lines[0]), int(lines[-1]) + 1
    size = max(stop - start, min(total, max(SMALLEST_BOX, round(SMALLEST_SHARE * total))))
    start = min(max(0, start - (size - (stop - start)) // 2), total - size)
    return start, start + size


def salient_crop(image: Tensor, saliency: Tensor) -> Tensor:
    """The salient boxes of images [B, C, H, W] at the images' own size; differentiable in them."""
    size = image.shape[2:]
    crops = [
        _enlarged(one[None, :, top:bottom, left:right], size)
        for one, (top, bottom, left, right) in zip(image, salient_boxes(saliency))
    ]
    return torch.cat(crops)
