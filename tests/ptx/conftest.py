"""The targets, and launches repeated in every order of warps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ptx import emulated

TARGETS = ("sm_80", "sm_90")
ORDERS = ("forward", "backward", "random")


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> str:
    """What kernels are compiled for."""
    return request.param


@pytest.fixture
def same_in_every_order(target: str) -> Callable[[Callable[[], Tensor]], Tensor]:
    """Runs a launch in every order of warps, requires the same bits of each, and returns them."""

    def run(launch: Callable[[], Tensor], *, harsh: bool = False) -> Tensor:
        results = []
        for order in ORDERS:
            with emulated(target, order=order, harsh=harsh) as runs:
                results.append(launch())
            assert runs, "nothing was emulated"
        for order, result in zip(ORDERS[1:], results[1:]):
            assert_same_bits(result, results[0], order)
        return results[0]

    return run


def assert_same_bits(result: Tensor, expected: Tensor, name: str = "") -> None:
    """Require the very bits, of NaN too."""
    assert torch.equal(result.view(torch.uint8), expected.view(torch.uint8)), name
