"""The words of image and text tokens: of regions that pull, and of prompts that regions see."""

from __future__ import annotations

import torch

from dense_attn import Layout, _checks
from dense_attn.layout_attention.layout import _BITS

from ..diffusers.layers import Layer, Side, joined, order_of
from ..diffusers.prompts import texts
from ..diffusers.prompts.blocks import Blocks, Half, Rule, Sequence
from ..diffusers.prompts.sharing import members, with_base
from .models import JOINED, SELF
from .numbers import Numbers
from .parts import Make, Place
from .regions import Region, of_images


def check_rows(images: int, rows: int) -> None:
    """Require masks of one image for all rows that see the prompt, or of one for each."""
    if images not in (1, rows):
        _checks.refuse("mask", f"be one, or one for each of the {rows} latents", images)


def of_prompts(regions: list[Region], base_ratio: float, backend: str) -> Make:
    """A maker of the blocks of layers with texts, where the image sees its region's."""
    images = of_images(regions)
    weights = torch.tensor([one.weight for one in regions], dtype=torch.float32, device="cpu")

    def make(
        place: Place, sizes: tuple[int, ...], rows: int, device: torch.device
    ) -> tuple[Blocks, Rule] | None:
        attention, (frames, *size), others = place
        if attention == SELF:
            return None
        own = [members(masks, weights, tuple(size), True).repeat(1, frames) for masks in images]
        shares = [with_base(one, base_ratio, [True] * len(regions)) for one in own]
        text = texts.words([sizes] * len(images), sizes, 1)
        check_rows(len(images), rows)
        half = Half(shares, own, [], text, rows // len(images), device)
        sequence = Sequence(attention, sum(sizes), shares[0].shape[1], others)
        return sequence.blocks(half, shares, False), Rule("mask", backend)

    return make


def of_layouts(regions: list[Region], numbers: Numbers) -> Make:
    """A maker of the layers of a layout."""
    for region in regions:
        region.check_pixels(0.5)
    layouts = [Layout(masks > 0.5) for masks in of_images(regions)]

    def make(
        place: Place, sizes: tuple[int, ...], rows: int, device: torch.device
    ) -> tuple[Blocks, Rule] | None:
        weight = numbers.self_weight if place.attention == SELF else numbers.cross_weight
        if not weight and not (place.attention == JOINED and numbers.text_weight):
            return None
        check_rows(len(layouts), rows)
        image, text = _image(layouts, place.grid, weight, numbers), _text(layouts, sizes, numbers)
        q, k = _sides(place, image, text, numbers)
        layer = Layer(
            q_words=q.words.to(device),
            k_words=k.words.to(device),
            strength=q.strength.to(device)[:, None],
            q_order=order_of(q).to(device),
            k_order=order_of(k).to(device) if place.attention.keys is None else None,
        )
        layer.now = layer.strength
        return Blocks([(layer, None)]), Rule(numbers.modulation, numbers.backend)

    return make


def _image(
    layouts: list[Layout], grid: tuple[int, int, int], weight: float, numbers: Numbers
) -> Side:
    """The tokens of an image, or of a video's frames one after the other."""
    frames, *size = grid
    how = {"weight": weight, "time": 1.0, "size_weight": numbers.size_weight}
    words = torch.stack([one.query_regions(*size) for one in layouts])
    strength = torch.stack([one.strength(*size, **how) for one in layouts])
    return Side(words.repeat(1, frames), strength.repeat(1, frames))


def _text(layouts: list[Layout], sizes: tuple[int, ...], numbers: Numbers) -> Side:
    """The tokens of the prompt, which are in no region, and of the regions' texts."""
    bits = torch.tensor([0, *_BITS[: len(layouts[0])]], dtype=torch.int32, device="cpu")
    counts = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    words = bits.repeat_interleave(counts).expand(len(layouts), -1)
    shares = torch.stack([one.masks.flatten(1).float().mean(1) for one in layouts])  # [P, R]
    pulls = numbers.text_weight * (1 - numbers.size_weight * shares)
    strength = torch.cat([torch.zeros_like(pulls[:, :1]), pulls], 1)
    return Side(words, strength.repeat_interleave(counts, 1))


def _sides(place: Place, image: Side, text: Side, numbers: Numbers) -> tuple[Side, Side]:
    """The queries and the keys of layers."""
    if place.attention == SELF:
        return image, image
    if place.attention != JOINED:
        return image, text
    shape = len(image.words), place.others
    kinds = (torch.int32, torch.float32)
    others = Side(*(torch.zeros(shape, dtype=kind, device="cpu") for kind in kinds))

    def as_one(text: Side, image: Side) -> Side:
        return joined_of(text, image, others)

    seen = image if numbers.self_weight else _wordless(image)
    asks = text if numbers.text_weight else _wordless(text)
    return as_one(asks, image), as_one(text, seen)


def joined_of(*sides: Side) -> Side:
    """The tokens of sides without a mark of the text, one after the other."""
    return joined(*(side._replace(text=torch.zeros_like(side.words)) for side in sides))


def _wordless(side: Side) -> Side:
    """A side whose tokens are in no region."""
    return side._replace(words=torch.zeros_like(side.words))
