"""How the prompts of regions share an image's tokens, as words for few calls of the attention.

The output of a token is `sum_b share_b * attention(q, k_b, v_b)`, where block b of the keys is a
prompt. Its largest share is in the first call, its second in another, so there are as many calls as
a token has prompts at most: one for regions that do not overlap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn.layout_attention.layout import _BITS, resized

SMALLEST = 1e-5  # share that counts; below is rounding of masks that add up to 1


class Round(NamedTuple):
    """One call of the attention: a block for each token, and the share that it has."""

    words: Tensor  # int32 [P, M], 0 where a token has no further block
    shares: Tensor | None  # float32 [P, M], None where all are 1


def members(masks: Tensor, weights: Tensor, size: tuple[int, int], base: bool) -> Tensor:
    """Shares of the base prompt and the regions, float32 [1 + R, M], that add up to 1.

    Where masks [R, H, W] add up to less than 1 the base prompt has the rest; without one, and above
    1, the regions share by `weight * mask`.
    """
    inside = _on_grid(masks, size).flatten(1)  # [R, M]
    total = inside.sum(0)
    rest = (1 - total).clamp(min=0) if base else torch.zeros_like(total)
    rest = torch.where(rest < SMALLEST, 0, rest)
    owned, tiny = torch.where(inside > 0, weights[:, None], 0), torch.finfo(torch.float32).tiny
    # a token's largest weight becomes 1, or sums of very large and small ones leave float32's range
    weighted = inside * (owned / torch.cat([torch.full_like(rest[None], tiny), owned]).amax(0))
    parts = weighted / weighted.sum(0).clamp(min=tiny)
    return torch.cat([rest[None], (1 - rest) * parts])


def _on_grid(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks [R, H, W] on a grid: by nearest pixels, soft ones by the mean of a cell."""
    if not len(masks):
        return masks.new_zeros(0, *size)
    hard = resized(masks > 0, size).float()
    soft = ((masks != 0) & (masks != 1)).flatten(1).any(1)
    means = torch.nn.functional.adaptive_avg_pool2d(masks, size)
    return torch.where(soft[:, None, None], means, hard)


def with_base(shares: Tensor, ratio: float, given: list[bool]) -> Tensor:
    """Shares [1 + R, M] with the base prompt's ratio; it also has regions without a text."""
    shares = torch.cat([ratio + (1 - ratio) * shares[:1], (1 - ratio) * shares[1:]])
    for r, has_text in enumerate(given):
        if not has_text:
            shares[0] += shares[1 + r]
            shares[1 + r] = 0
    alone = shares.max(0).values > 1 - 1e-6  # of one block, but for rounding
    return torch.where(alone, (shares == shares.max(0).values).float(), shares)


def areas_of(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The part that each region covers of all frames, float32 [R]; 1 where it covers none."""
    frames = [_on_grid(frame, size).flatten(1).mean(1) for frame in masks.unbind(1)]
    inside = torch.stack(frames).mean(0)
    return torch.where(inside > 0, inside, 1)


def words_of(shares: Tensor) -> Tensor:
    """The blocks that a token has a share of, int32 [M], from shares [1 + R, M]."""
    bits = torch.tensor(_BITS[: len(shares)], dtype=torch.int32, device=shares.device)
    return ((shares > 0) * bits[:, None]).sum(0, dtype=torch.int32)


def rounds(images: list[Tensor]) -> list[Round]:
    """The calls for shares [blocks, M] of each image."""
    count = max(1, *(int((shares > 0).sum(0).max()) for shares in images))
    found = []
    for j in range(count):
        words, parts = zip(*(_block(shares, j) for shares in images))
        part = torch.stack(parts)
        found.append(Round(torch.stack(words), None if bool((part == 1).all()) else part))
    return found


def _block(shares: Tensor, j: int) -> tuple[Tensor, Tensor]:
    """The word of each token's block with its j-th largest share, and that share."""
    if j >= len(shares):
        return torch.zeros_like(shares[0], dtype=torch.int32), torch.zeros_like(shares[0])
    part, block = (side[j] for side in shares.sort(dim=0, descending=True, stable=True))
    bits = torch.tensor(_BITS[: len(shares)], dtype=torch.int32, device=shares.device)
    return torch.where(part > 0, bits[block], 0), part
