"""Triton's and CUDA's kernels of reversible steps against the reference, to the bit: on a GPU,
emulated or interpreted.

Run by test_interpreted, test_emulated and `make gpu`. Interpreted, bfloat16 is an input only: the
interpreter cuts a float32 down to it where a GPU rounds.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DEVICES, INTERPRETED, why_skip
from placed import Placed, same
from torch import Tensor

from dense_attn import reference
from dense_attn._backends import table

OFF_GRID = 2**62  # marks what left the grid
INPUTS = (torch.float32, torch.float16, torch.float64, torch.bfloat16)
DTYPES = INPUTS[: 3 if INTERPRETED else 4]  # of results
SHAPES = ((), (1,), (2, 3, 17, 33), (0, 3))
OFF_GRID_TEXT = (
    r"eps must be finite and keep the latents within the grid of 2\^50 steps, got \S+ steps"
)

# numpy's own
pytestmark = pytest.mark.filterwarnings(
    "ignore:(invalid value|overflow) encountered:RuntimeWarning"
)


def _not_here(backend: str) -> str | None:
    return why_skip(backend, "ddim_step")


@pytest.fixture(params=["triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend of GPUs."""
    if reason := _not_here(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def reversible(backend: str) -> Placed:
    """The backend's ops."""
    return Placed(table.NAMESPACES[backend], DEVICES[backend])


@pytest.fixture
def launched(backend: str) -> Placed:
    """The launches alone, which refuse nothing."""
    if backend == "cuda":
        return Placed(torch.ops.dense_attn_cuda, DEVICES[backend])
    from dense_attn.triton_kernels import reversible as launchers

    return Placed(launchers, DEVICES[backend])


def pair(
    dtype: torch.dtype, eps_dtype: torch.dtype, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *torch.randn(2, *shape).to(dtype), *torch.randn(2, *shape).to(eps_dtype)


@pytest.mark.parametrize("eps_dtype", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_float_steps(dtype: torch.dtype, eps_dtype: torch.dtype, reversible: Placed) -> None:
    x, y, eps, uncond = pair(dtype, eps_dtype, SHAPES[2])
    steps = [("ddim_step", (x, eps, other, 0.9, 0.3, 7.5)) for other in (uncond, None)]
    steps += [("leapfrog_step", (x, y, eps, 0.9, -0.3, 1.1))]
    for name in ("edict_mix", "edict_unmix"):
        for change, couple_x in ((eps, True), (eps, False), (None, True)):
            steps.append((name, (x, y, change, 0.9, 0.3, 0.93, couple_x)))
    for name, arguments in steps:
        same(getattr(reversible, name)(*arguments), getattr(reference, name)(*arguments))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_of_any_shape(shape: tuple[int, ...], reversible: Placed) -> None:
    x, y, eps, _ = pair(torch.float32, torch.float32, shape)
    same(
        reversible.leapfrog_step(x, y, eps, 0.9, -0.3, 1.1),
        reference.leapfrog_step(x, y, eps, 0.9, -0.3, 1.1),
    )


def coordinates(shape: tuple[int, ...], largest: int = 2**47) -> Tensor:
    return torch.randint(-largest, largest, shape)


@pytest.mark.parametrize("eps_dtype", INPUTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_exact_steps(dtype: torch.dtype, eps_dtype: torch.dtype, reversible: Placed) -> None:
    shape, to_latent = (2, 3, 5, 11), 2.0**-44
    x, y, eps = coordinates(shape), coordinates(shape), torch.randn(shape).to(eps_dtype)
    steps: list[tuple[str, tuple]] = [
        ("exact_couple", (x, eps, 12345.678, to_latent, dtype)),
        ("exact_couple", (x, torch.full_like(eps, 0.5), 5.0, to_latent, dtype)),  # ties: 2.5
        ("exact_leapfrog", (x, y, eps, 0.93, 12345.678, to_latent, dtype)),
    ]
    for name in ("exact_mix", "exact_unmix"):
        for change, couple_x, latent_x in (
            (eps, True, False),
            (eps, False, True),
            (None, True, True),
        ):
            steps.append(
                (name, (x, y, change, 12345.6, 0.93, couple_x, to_latent, latent_x, dtype))
            )
    for name, arguments in steps:
        same(getattr(reversible, name)(*arguments), getattr(reference, name)(*arguments))


def test_latents_are_rounded_by_way_of_float32(reversible: Placed) -> None:
    """Rounding by way of float32, as torch has it: just above the middle of two float16 numbers."""
    z = torch.tensor([2**40 + 2**29 + 1])
    arguments = (z, torch.zeros(1), 1.0, 2.0**-40, torch.float16)
    same(reversible.exact_couple(*arguments), reference.exact_couple(*arguments))


def test_channels_last_memory_is_taken_as_it_lies(reversible: Placed) -> None:
    x, y = (
        coordinates((2, 3, 5, 4)).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    arguments = (x, y, None, 0.0, 0.93, True, 0.5, True, torch.float32)
    got = reversible.exact_mix(*arguments)
    assert [z.stride() for z in got] == [x.stride()] * 3
    same(got, reference.exact_mix(*arguments))


def test_exact_steps_undo_each_other(reversible: Placed) -> None:
    x, y, eps = coordinates((1000,)), coordinates((1000,)), torch.randn(1000)
    mixed = reversible.exact_mix(x, y, eps, 1e6, 0.93, True, 1.0, True, torch.float32)[:2]
    unmixed = reversible.exact_unmix(*mixed, None, 0.0, 0.93, True, 1.0, True, torch.float32)[:2]
    back = reversible.exact_couple(unmixed[0], eps, -1e6, 1.0, torch.float32)[0]
    same((back, unmixed[1]), (x, y))
    assert not torch.equal(mixed[0], x)


OFFENDERS = [  # z, eps, what becomes of z
    *(
        (0, 2.0**50, 2**50),
        (0, -(2.0**50), -(2**50)),
        (0, 2.0**50 + 1, None),
        (2**50, 1.0, None),
        (-(2**50), -1.0, None),
    ),
    *((0, eps, None) for eps in (1e300, -1e300, -float("inf"), float("inf"), float("nan"))),
    (OFF_GRID, -1.0, None),
]


@pytest.mark.parametrize(("z", "eps", "expected"), OFFENDERS)
def test_the_edge_of_the_grid(
    z: int, eps: float, expected: int | None, reversible: Placed, launched: Placed, backend: str
) -> None:
    arguments = (
        torch.tensor([5, z]),
        torch.tensor([0.0, eps], dtype=torch.float64),
        1.0,
        1.0,
        torch.float64,
    )
    if expected is not None:
        same(reversible.exact_couple(*arguments), reference.exact_couple(*arguments))
        return
    if DEVICES[backend] == "cpu":  # a GPU's caller waits for no kernel
        with pytest.raises(RuntimeError, match=OFF_GRID_TEXT):
            reversible.exact_couple(*arguments)
    moved, latent = launched.exact_couple(*arguments)  # as on a GPU
    assert moved.tolist() == [5, OFF_GRID]
    assert latent.isnan().tolist() == [False, True]


@pytest.mark.parametrize("op", ["exact_mix", "exact_unmix"])
def test_what_left_the_grid_stays_off_it(op: str, launched: Placed) -> None:
    """Its partner follows, whatever the mix: the shear of a lost coordinate is no number."""
    lost, good = torch.tensor([OFF_GRID, 3]), torch.tensor([7, 4])
    x, y, latent = getattr(launched, op)(
        lost, good, None, 0.0, 0.999999, True, 1.0, False, torch.float32
    )
    assert x[0] == y[0] == OFF_GRID
    assert latent.isnan().tolist() == [True, False]


X, GRID = torch.randn(2, 3), torch.arange(6).reshape(2, 3)
REFUSALS: dict[str, tuple[Callable, str]] = {
    "shape": (
        lambda steps: steps.ddim_step(X, X[:1], None, 1, 1, 1),
        r"eps must have x's shape \(2, 3\), got \(1, 3\)",
    ),
    "dtype": (
        lambda steps: steps.leapfrog_step(X, X.half(), X, 1, 1, 1),
        "near must have far's dtype float32, got",
    ),
    "eps dtype": (
        lambda steps: steps.ddim_step(X, X.int(), None, 1, 1, 1),
        "eps must be one of .*, got int32",
    ),
    "uncond": (
        lambda steps: steps.ddim_step(X, X, X.half(), 1, 1, 1),
        "eps_uncond must have eps' dtype float32, got",
    ),
    "gaps": (
        lambda steps: steps.ddim_step(X[:, ::2], X[:, ::2], None, 1, 1, 1),
        r"x must be dense, got strides",
    ),
    "strides": (
        lambda steps: steps.edict_mix(X, torch.randn(3, 2).t(), None, 1, 1, 0.9, True),
        r"y must be dense and have x's strides \(3, 1\), got strides \(1, 2\)",
    ),
    "grid": (
        lambda steps: steps.exact_couple(X, X, 1, 1, torch.float32),
        "z must be int64, got float32",
    ),
    "latent": (
        lambda steps: steps.exact_couple(GRID, X, 1, 1, torch.int32),
        "dtype must be one of .*, got int32",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
@pytest.mark.parametrize("backend", ["triton"], indirect=True)  # C++ has words of its own
def test_refusals(name: str, reversible: Placed) -> None:
    call, message = REFUSALS[name]
    with pytest.raises(RuntimeError, match=message):
        call(reversible)
