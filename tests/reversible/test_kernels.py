"""The raw ops of the reversible steps against the reference: accurate floats, the grid's bits."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import raw
import torch
from accuracy import assert_accurate
from cases import DTYPES, why_skip
from chains import (
    EXACT_STEPS,
    LATENTS,
    STEPS,
    arguments,
    coordinates,
    exact_arguments,
    expected,
    kernel,
)
from torch import Tensor

from dense_attn import _checks

pytestmark = [
    pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu"))),
    pytest.mark.usefixtures("poisoned_memory"),
]
LIMIT = 2**50
MESSAGE = re.escape("eps must be finite and keep the latents within the grid of 2^50 steps, got ")
SHAPES = [(), (0,), (3, 0, 2), (1,), (2, 3, 5, 7), (511,), (512,), (513,), (40000,), (2, 4, 65, 64)]
CORE = [
    (torch.float32, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float16),
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float64),
    (torch.float32, torch.float16),
]


def dtype_pairs() -> list:
    """Dtypes of the latent and of eps; some of them run again on every instruction set."""
    pairs = []
    for dtype, eps_dtype in itertools.product(DTYPES, DTYPES):
        core = [pytest.mark.core] * ((dtype, eps_dtype) in CORE)
        pairs.append(
            pytest.param(
                dtype, eps_dtype, marks=core, id=f"{_checks.name(dtype)}-{_checks.name(eps_dtype)}"
            )
        )
    return pairs


def exact_and_plain(op: str, given: raw.Arguments) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    wide = {name: x.double() if isinstance(x, Tensor) else x for name, x in given.items()}
    return expected(op, wide), expected(op, given)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("dtype", "eps_dtype"), dtype_pairs())
def test_float_steps(step: str, dtype: torch.dtype, eps_dtype: torch.dtype) -> None:
    op, changes = STEPS[step]
    for shape in SHAPES:
        given = arguments(shape, dtype, eps_dtype, **changes)
        exact, plain = exact_and_plain(op, given)
        for i, result in enumerate(kernel(op, given)):
            assert result.dtype == dtype
            assert_accurate(f"{op}[{i}] of {shape}", result, exact[i], plain[i], dtype)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=_checks.name)
def test_a_step_on_the_neighbour_is_rejected(step: str, dtype: torch.dtype) -> None:
    """The negative control: the rule sees each operand moved by one element, in every result."""
    op, changes = STEPS[step]
    given = arguments((513,), dtype, b=1.0, mix=0.6, **changes)
    exact, plain = exact_and_plain(op, given)
    for name in raw.argument_names(op):
        if isinstance(given[name], Tensor):
            for i, result in enumerate(kernel(op, {**given, name: given[name].roll(1)})):
                with pytest.raises(AssertionError, match="is off by"):
                    assert_accurate(op, result, exact[i], plain[i], dtype)


@pytest.mark.parametrize("step", EXACT_STEPS)
@pytest.mark.parametrize(("dtype", "eps_dtype"), dtype_pairs())
def test_exact_steps(step: str, dtype: torch.dtype, eps_dtype: torch.dtype) -> None:
    op, changes = EXACT_STEPS[step]
    for shape in SHAPES:
        given = exact_arguments(shape, dtype, eps_dtype, **changes)
        results = kernel(op, given)
        assert [x.dtype for x in results] == [torch.int64] * (len(results) - 1) + [dtype]
        assert all(map(torch.equal, results, expected(op, given))), shape


@pytest.mark.core
def test_halves_go_to_the_even_neighbour() -> None:
    eps = torch.arange(-1001, 1001) / 2
    moved, latent = kernel(
        "exact_couple", exact_arguments(z=torch.zeros(2002).long(), eps=eps, step=1.0, to_latent=1)
    )
    assert moved.tolist() == [round(x) for x in eps.tolist()]
    assert torch.equal(latent, moved.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=_checks.name)
def test_latents_of_every_magnitude(dtype: torch.dtype) -> None:
    """Overflow, underflow and ties of the one rounding from float64."""
    z = coordinates((20000,), 50)
    for exponent in (-1100, -190, -64, -50, -30, 0, 90, 1000):
        given = exact_arguments(
            z=z, eps=torch.zeros(z.shape), dtype=dtype, to_latent=1.03 * 2.0**exponent
        )
        assert torch.equal(kernel("exact_couple", given)[1], expected("exact_couple", given)[1]), (
            exponent
        )


@pytest.mark.core
@pytest.mark.parametrize("there", [kernel, expected])
@pytest.mark.parametrize("back", [kernel, expected])
def test_round_trips(there: Callable, back: Callable) -> None:
    """Every step is undone to the last bit, by the kernel and by the reference alike."""
    x, y, eps = coordinates((40000,), 49), coordinates((40000,), 49), torch.randn(40000).half()
    given = exact_arguments(far=x, near=y, z=x, x=x, y=y, eps=eps)
    z = there("exact_couple", given)[0]
    assert not torch.equal(z, x)
    assert torch.equal(back("exact_couple", {**given, "z": z, "step": -given["step"]})[0], x)
    z = there("exact_leapfrog", given)[0]
    assert not torch.equal(z, x)
    signs = {name: -given[name] for name in ("c_near", "c_eps")}
    assert torch.equal(back("exact_leapfrog", {**given, "far": z, **signs})[0], x)
    for mix in (0.5, 0.93, 0.99):
        uncoupled = {**given, "eps": None, "mix": mix}
        for op, inverse in (("exact_mix", "exact_unmix"), ("exact_unmix", "exact_mix")):
            *moved, _ = there(op, uncoupled)
            assert not torch.equal(moved[0], x)
            *returned, _ = back(inverse, {**uncoupled, **dict(zip("xy", moved))})
            assert torch.equal(returned[0], x)
            assert torch.equal(returned[1], y)


def outcome(call: Callable, op: str, given: raw.Arguments) -> list | str:
    try:
        return [x.tolist() for x in call(op, given)]
    except RuntimeError as refusal:
        return "refused" if re.search(MESSAGE + r"\S+ steps", str(refusal)) else str(refusal)


@pytest.mark.core
@pytest.mark.parametrize("step", EXACT_STEPS)
def test_the_edge_of_the_grid(step: str) -> None:
    """Whatever the integers and eps, kernel and reference return the same or refuse both."""
    op, changes = EXACT_STEPS[step]
    edges = [
        s * edge + d for edge in (0, LIMIT, 2 * LIMIT, 2**53) for s in (-1, 1) for d in (-1, 0, 1)
    ]
    edges += [-(2**63), 2**63 - 1, 2**62 + 12345]
    steps = [
        0.0,
        0.5,
        1.0,
        -1.0,
        LIMIT,
        -LIMIT,
        LIMIT + 0.25,
        LIMIT + 1.0,
        1e300,
        *map(float, ("inf", "-inf", "nan")),
    ]
    seen = set()
    for first, second, eps in itertools.product(edges[::2], edges[1::2], steps):
        pair = [torch.tensor([z]) for z in (first, second)]
        latents = {name: pair[name in ("y", "near")] for name in LATENTS}
        eps = torch.tensor([eps], dtype=torch.float64)
        given = exact_arguments(
            **{**latents, "eps": eps, "step": 1.0, "c_eps": 1.0, "c_near": 1e-3, **changes}
        )
        result = outcome(kernel, op, given)
        assert result == outcome(expected, op, given), (first, second, eps)
        seen.add(result == "refused")
    assert seen == {True, False}


@pytest.mark.parametrize("length", [1, 512, 40001])
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, -torch.nan, 3e30])
@pytest.mark.parametrize("op", ["exact_couple", "exact_leapfrog", "exact_mix", "exact_unmix"])
def test_what_leaves_the_grid_is_refused(op: str, value: float, length: int) -> None:
    for place in {0, length // 2, length - 1}:
        given = exact_arguments((length,), c_eps=1.0, step=1.0)
        given["eps"][place] = value
        before = {name: x.clone() for name, x in given.items() if isinstance(x, Tensor)}
        with pytest.raises(RuntimeError, match=MESSAGE) as refusal:
            raw.call(op, given)
        if op in ("exact_couple", "exact_leapfrog"):  # of the numbers of a mix any may be named
            with pytest.raises(RuntimeError, match=MESSAGE) as words:
                expected(op, given)
            assert str(words.value) in str(refusal.value)
        assert all(
            torch.equal(given[name].nan_to_num(), x.nan_to_num()) for name, x in before.items()
        )
