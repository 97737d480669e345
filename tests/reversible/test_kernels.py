"""The raw ops of the reversible steps against the reference: floats by the rule of accuracy, the
grid bit by bit.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest
import raw
import torch
from accuracy import assert_accurate
from cases import DTYPES, why_skip
from torch import Tensor

from dense_attn import _checks, reference

pytestmark = [
    pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu"))),
    pytest.mark.usefixtures("poisoned_memory"),
]
LATENTS, LIMIT = ("x", "y", "far", "near", "z"), 2**50
COUPLINGS = {"x": {"couple_x": True}, "y": {"couple_x": False}, "none": {"eps": None}}
STEPS = {  # what each step may be asked for: the op and what differs from `arguments`
    "ddim": ("ddim_step", {"eps_uncond": None}),
    "ddim-guided": ("ddim_step", {}),
    "leapfrog": ("leapfrog_step", {}),
    **{
        f"{op}-{which}": (op, change)
        for op in ("edict_mix", "edict_unmix")
        for which, change in COUPLINGS.items()
    },
}
EXACT_STEPS = {"couple": ("exact_couple", {}), "leapfrog": ("exact_leapfrog", {})}
EXACT_STEPS |= {
    f"{op}-{which}": (op, {**change, "latent_x": which == "y"})
    for op in ("exact_mix", "exact_unmix")
    for which, change in COUPLINGS.items()
}
EVERY_STEP = {**STEPS, **{f"exact-{name}": step for name, step in EXACT_STEPS.items()}}
MESSAGE = re.escape("eps must be finite and keep the latents within the grid of 2^50 steps, got ")
SHAPES = [(), (0,), (3, 0, 2), (1,), (2, 3, 5, 7), (511,), (512,), (513,), (40000,), (2, 4, 65, 64)]
CORE = [
    (torch.float32, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.float64, torch.float16),
]
CORE += [
    (torch.bfloat16, torch.float64),
    (torch.float64, torch.float64),
    (torch.float32, torch.float16),
]


def dtype_pairs() -> list:
    """Of the latent and of eps; some of them run again on every instruction set."""
    pairs = []
    for dtype, eps_dtype in itertools.product(DTYPES, DTYPES):
        core = [pytest.mark.core] * ((dtype, eps_dtype) in CORE)
        pairs.append(
            pytest.param(
                dtype, eps_dtype, marks=core, id=f"{_checks.name(dtype)}-{_checks.name(eps_dtype)}"
            )
        )
    return pairs


def coordinates(shape: tuple[int, ...], bits: int) -> Tensor:
    """Integers of all magnitudes below 2^bits."""
    return torch.randint(-(2**bits), 2**bits, shape) >> torch.randint(0, bits, shape)


def arguments(
    shape: tuple[int, ...] = (2, 3, 5, 7),
    dtype: torch.dtype = torch.float32,
    eps_dtype: torch.dtype = torch.float32,
    **changes: object,
) -> raw.Arguments:
    """A call of any of the float ops that is right in every respect."""
    latents = {name: torch.randn(shape).to(dtype) for name in LATENTS}
    eps = {name: torch.randn(shape).to(eps_dtype) for name in ("eps", "eps_uncond")}
    numbers = {
        "a": 0.98,
        "b": 0.13,
        "guidance_scale": 7.5,
        "c_far": 1.1,
        "c_near": -0.4,
        "c_eps": 0.3,
        "mix": 0.93,
    }
    return {**latents, **eps, **numbers, "couple_x": True, **changes}


def exact_arguments(
    shape: tuple[int, ...] = (2, 3, 5, 7),
    dtype: torch.dtype = torch.float32,
    eps_dtype: torch.dtype = torch.float32,
    **changes: object,
) -> raw.Arguments:
    """The same for the ops on the grid."""
    good = arguments(shape, eps_dtype=eps_dtype) | {
        name: coordinates(shape, 48) for name in LATENTS
    }
    numbers = {"step": 12345678.9, "c_eps": -3456789.1, "to_latent": 0.7**5 * 2.0**-46}
    return {**good, **numbers, "couple_x": True, "latent_x": True, "dtype": dtype, **changes}


def any_arguments(step: str) -> tuple[str, raw.Arguments]:
    op, changes = EVERY_STEP[step]
    return op, (exact_arguments if op.startswith("exact") else arguments)(**changes)


def as_tuple(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def kernel(op: str, given: raw.Arguments) -> tuple[Tensor, ...]:
    return as_tuple(raw.call(op, given))


def expected(op: str, given: raw.Arguments) -> tuple[Tensor, ...]:
    return as_tuple(
        getattr(reference, op)(**{name: given[name] for name in raw.argument_names(op)})
    )


def in_memory_order(x: object, order: str) -> object:
    """A 4-D tensor under the strides that the order names."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    if order == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if order == "transposed":
        return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)  # unaligned


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
    """The negative control: the rule must see every operand that is moved by one element, in every
    result.
    """
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


@pytest.mark.parametrize("order", ["channels_last", "transposed", "unaligned"])
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 8, 33, 65), (2, 1, 1, 9), (0, 3, 5, 7)])
@pytest.mark.parametrize("step", EVERY_STEP)
def test_dense_memory_in_any_order(step: str, shape: tuple[int, ...], order: str) -> None:
    op, changes = EVERY_STEP[step]
    given = (exact_arguments if op.startswith("exact") else arguments)(shape, **changes)
    given = {name: in_memory_order(x, order) for name, x in given.items()}
    first = given[raw.argument_names(op)[0]]
    for result, right in zip(kernel(op, given), expected(op, given)):
        torch.testing.assert_close(result, right, rtol=1e-5, atol=1e-6)
        assert result.stride() == torch.empty_like(first).stride()


def test_the_stride_of_an_axis_of_one_does_not_matter() -> None:
    given = arguments((4, 1, 6))
    given["eps"] = given["eps"].as_strided((4, 1, 6), (6, 17, 1))
    torch.testing.assert_close(raw.call("ddim_step", given), expected("ddim_step", given)[0])


def spoiled(good: Tensor, first: bool) -> list[Tensor]:
    """Wrong shapes, strides, dtypes, devices and layouts of a tensor argument."""
    wrong = [
        good.mT,
        good[:, :, ::2],
        good[..., :1].expand(good.shape),
        good.repeat(1, 1, 1, 2)[..., ::2],
    ]
    wrong += [
        good.contiguous(memory_format=torch.channels_last),
        good[None],
        good[0],
        good.new_zeros(()),
    ]
    wrong = [x for x in wrong if not (first and x.is_contiguous())]
    wrong += [
        good.to(torch.complex64),
        good.to(torch.int32),
        good.bool(),
        good.to("meta"),
        good.to_sparse(),
    ]
    return wrong + ([] if good.is_floating_point() else [good.float()])


@pytest.mark.parametrize("step", EVERY_STEP)
def test_raw_calls_refuse(step: str) -> None:
    op, good = any_arguments(step)
    names = [name for name in raw.argument_names(op) if isinstance(good[name], Tensor)]
    for name in names:
        for value in spoiled(good[name], name == names[0]):
            with pytest.raises(RuntimeError) as refusal:
                raw.call(op, {**good, name: value})
            if value.layout == torch.strided:
                assert re.match(r"(\w+, \S+, )?[a-z_]+ must .+, got .+", str(refusal.value)), (
                    refusal.value
                )


@pytest.mark.parametrize("step", EVERY_STEP)
def test_gaps_and_overlaps_are_refused(step: str) -> None:
    """Though every operand has them."""
    op, good = any_arguments(step)
    for view in (
        lambda x: x[..., ::2],
        lambda x: x[:, :, 1:],
        lambda x: x[..., :1].expand(x.shape),
    ):
        views = {name: view(x) if isinstance(x, Tensor) else x for name, x in good.items()}
        with pytest.raises(
            RuntimeError,
            match=f"{raw.argument_names(op)[0]} must be dense, got shape .+ and strides ",
        ):
            raw.call(op, views)


def test_raw_calls_refuse_other_dtypes() -> None:
    half = torch.zeros(2, 3, 5, 7).half()
    for op, name in (
        ("leapfrog_step", "near"),
        ("edict_mix", "y"),
        ("edict_unmix", "y"),
        ("ddim_step", "eps_uncond"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must have dtype Float, got Half"):
            raw.call(op, arguments(**{name: half}))
    for op, name in (
        ("exact_couple", "z"),
        ("exact_leapfrog", "near"),
        ("exact_mix", "y"),
        ("exact_unmix", "x"),
    ):
        with pytest.raises(RuntimeError, match=f"{name} must have dtype Long, got Half"):
            raw.call(op, exact_arguments(**{name: half}))
        with pytest.raises(
            RuntimeError, match="dtype must be float32, float64, float16 or bfloat16, got Int"
        ):
            raw.call(op, exact_arguments(dtype=torch.int32))
    for op in ("exact_mix", "exact_unmix"):
        with pytest.raises(RuntimeError, match="mix must not be 0, got 0"):
            raw.call(op, exact_arguments(mix=0.0))


@pytest.mark.parametrize("step", EVERY_STEP)
@pytest.mark.parametrize("order", ["contiguous", "channels_last"])
def test_opcheck(step: str, order: str) -> None:
    op, given = any_arguments(step)
    if order == "channels_last":
        given = {name: in_memory_order(x, order) for name, x in given.items()}
    positional, by_name = raw.select(op, given)
    torch.library.opcheck(getattr(torch.ops.dense_attn, op).default, positional, by_name)
