"""Raw calls of the reversible steps: memory in any order, and what is refused."""

from __future__ import annotations

import re

import pytest
import raw
import torch
from cases import why_skip
from chains import (
    EVERY_STEP,
    any_arguments,
    arguments,
    exact_arguments,
    expected,
    kernel,
)
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu"))),
    pytest.mark.usefixtures("poisoned_memory"),
]


def in_memory_order(x: object, order: str) -> object:
    """A 4-D tensor under the strides that the order names."""
    if not isinstance(x, Tensor) or x.dim() != 4:
        return x
    if order == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if order == "transposed":
        return x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)  # unaligned


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
