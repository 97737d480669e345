"""Tables of alphas_cumprod: entries in use fall with the timesteps, others may be anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from chains import ALPHAS, Network, timesteps

from dense_attn import ReversibleSampler

METHODS = [("edict", True), ("edict", False), ("bdia", True), ("belm", False), ("ddim", False)]
each_method = pytest.mark.parametrize(("method", "exact"), METHODS)
UNUSED = [0.0, -1.0, 1.5, float("nan"), float("inf"), 1e-300]


@each_method
@pytest.mark.parametrize("unused", UNUSED)
def test_entries_not_used_may_be_anything(unused: float, method: str, exact: bool) -> None:
    """The last entry of a schedule of zero terminal signal is one, which no timestep reaches."""
    table, steps = ALPHAS.clone(), timesteps(4)
    others = torch.ones(1000, dtype=torch.bool)
    others[[0, *steps]] = False
    table[others] = unused
    x = torch.randn(1, 4, 5, 6)
    network = Network()
    for given in (table, table.tolist(), table.numpy()):
        chain = ReversibleSampler(given, steps, method=method, exact=exact)
        expected = ReversibleSampler(ALPHAS, steps, method=method, exact=exact)
        assert all(map(torch.equal, chain.sample(network, x), expected.sample(network, x)))


def test_the_first_entry_is_used_where_no_other_end_is_named() -> None:
    table = [0.0, 0.9, 0.8]
    with pytest.raises(
        ValueError, match=r"^alphas_cumprod must be in \(0, 1\], got 0.0 at timestep 0$"
    ):
        ReversibleSampler(table, [2, 1])
    ReversibleSampler(table, [2, 1], final_alpha_cumprod=1.0)


@pytest.mark.parametrize(
    ("wrong", "got"),
    [(0.0, "0.0"), (-0.5, "-0.5"), (1.5, "1.5"), (float("nan"), "nan"), (float("inf"), "inf")],
)
@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_entries_that_are_used_are_refused_by_their_timestep(
    wrong: float, got: str, kind: Callable
) -> None:
    with pytest.raises(ValueError, match=f"^alphas_cumprod must .*, got {got} at timestep 2$"):
        ReversibleSampler(kind([0.9, 0.8, wrong, 0.6]), [3, 2, 1])
    with pytest.raises(
        TypeError, match=r"^alphas_cumprod must be a number .*, got str at timestep 2$"
    ):
        ReversibleSampler([0.9, 0.8, "0.7", 0.6], [3, 2, 1])


@each_method
@pytest.mark.parametrize(
    ("table", "steps", "sentence"),
    [
        ([0.1, 0.5, 0.9], [2, 1], r"got 0.9 at timestep 2 and 0.5 at timestep 1"),
        ([0.9, 0.5, 0.6, 0.4], [3, 2, 1], r"got 0.6 at timestep 2 and 0.5 at timestep 1"),
        ([0.5, 0.9, 0.8], [2, 1], r"got 0.9 at timestep 1 and 0.5 at timestep 0"),
        (
            torch.linspace(0.01, 0.999, 1000),
            timesteps(50),
            "got 0.98.* at timestep 981 and 0.96.* at timestep 961",
        ),
        (
            torch.linspace(0.9, 0.99, 1000),
            timesteps(200),
            "got 0.98.* at timestep 996 and 0.98.* at timestep",
        ),
    ],
    ids=["rises", "rises in between", "rises at the end", "reversed", "rises slowly"],
)
def test_tables_that_rise_are_refused(
    table: object, steps: list[int], sentence: str, method: str, exact: bool
) -> None:
    with pytest.raises(
        ValueError, match=f"^alphas_cumprod must not rise with the timesteps used, {sentence}"
    ):
        ReversibleSampler(table, steps, method=method, exact=exact)


@pytest.mark.parametrize(
    ("table", "steps", "end"),
    [
        ([0.9, 0.9, 0.8], [2, 1], None),
        ([0.9, 0.9, 0.9], [2, 1, 0], 0.9),
        ([0.9, 0.8, 0.7], [2, 1, 0], None),
        ([0.9, 0.8, 0.7], [2, 1, 0], 1.0),
        (ALPHAS, [500, 0], ALPHAS[0].float()),
        ([0.95, 0.9, 0.8], [2, 1], 0.5),
        ([0.9, 0.899, 0.9, 0.7], [3, 2, 1], None),
        (ALPHAS, [500, 250], ALPHAS[250].item()),
        (ALPHAS.bfloat16(), timesteps(200), None),
        (ALPHAS.half(), range(999, -1, -1), None),
    ],
)
def test_schedules_with_equal_or_rounded_neighbours_and_any_end_are_taken(
    table: Sequence[float], steps: Sequence[int], end: object
) -> None:
    chain = ReversibleSampler(table, steps, mix=0.999, final_alpha_cumprod=end)
    network = lambda x, t: torch.tanh(x)  # noqa: E731
    image = chain.sample(network, torch.randn(3))
    assert all(map(torch.equal, chain.sample(network, *chain.invert(network, *image)), image))
