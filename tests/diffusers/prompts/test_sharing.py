"""How regions share the tokens of an image, by weights of any size."""

from __future__ import annotations

import pytest
import torch

from dense_attn.integrations.diffusers import Region
from dense_attn.integrations.diffusers.prompts import region, sharing


@pytest.mark.parametrize("weight", [1.0, 3e38, 1.2e-38])
def test_shares_of_overlapping_regions(weight: float) -> None:
    """A half, a third and two thirds, however large or small the weights are."""
    both, left = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)
    for factor, share in ((1, 1 / 2), (0.5 if weight > 1 else 2, None)):
        other = factor * weight
        (parsed,) = region.parse([Region(both, "a", weight), Region(left, "b", other)], None)
        shares = sharing.members(parsed.masks, parsed.weights, (1, 2), base=False)
        expected = share or weight / (weight + other)
        right = torch.tensor([[0, 0], [expected, 1], [1 - expected, 0]])
        torch.testing.assert_close(shares, right, rtol=1e-5, atol=0)


def test_a_light_region_alone_beside_a_heavy_one() -> None:
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    regions = [Region(left, "a", 3e38), Region(right, "b", 1.2e-38)]
    (parsed,) = region.parse(regions, None)
    shares = sharing.members(parsed.masks, parsed.weights, (1, 2), base=False)
    assert shares.tolist() == [[0, 0], [1, 0], [0, 1]]
