"""PyTorch around semantic guidance: derivatives, opcheck, compile, export, transforms."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import raw
import torch
from cases import backends, why_skip
from sega_cases import LISTS, NUMBERS, raw_options
from torch import Tensor

from dense_attn import percentile_mask, sega_guidance

every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))
needs_cpu_kernels = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
OPTIONS = {**{name: list(values[:3]) for name, values in LISTS.items()}, **NUMBERS}
RAW_LISTS = ("edit_guidance_scale", "edit_threshold", "weights", "partials", "reverse")
NAMES = ("percentile_mask", "sega_guidance") if why_skip("cpu") is None else ()
OPS = {name: getattr(torch.ops.dense_attn, name).default for name in NAMES}


@every_backend
@pytest.mark.parametrize(
    ("warm", "sum_channels"), list(product([(True,) * 3, (True, False, True)], [False, True]))
)
def test_gradcheck(backend: str, warm: tuple[bool, ...], sum_channels: bool) -> None:
    """First and second derivatives in float64; random numbers stay away from their thresholds."""
    shapes = ((1, 2, 3, 2), (1, 2, 3, 2), (3, 1, 2, 3, 2), (1, 2, 3, 2), (3, 1, 1, 3, 1))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    options = {**{name: values[:3] for name, values in LISTS.items()}, **NUMBERS, "warm": warm}

    def step(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        mask = tensors[4] if len(tensors) > 4 else None
        return sega_guidance(
            *tensors[:4], **options, user_mask=mask, sum_channels=sum_channels, backend=backend
        )

    for count in (4, 5):
        assert torch.autograd.gradcheck(step, leaves[:count])
        assert torch.autograd.gradgradcheck(step, leaves[:count])


@every_backend
@pytest.mark.parametrize("dim", [-1, (0, 2), (2, 0, 1)])
def test_gradcheck_of_the_percentile_mask(backend: str, dim: int | tuple[int, ...]) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    mask = partial(percentile_mask, level=0.6, dim=dim, backend=backend)
    assert not mask(x)[1].requires_grad
    assert torch.autograd.gradcheck(lambda x: mask(x)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: mask(x)[0].square(), x)
    zeros = torch.zeros(2, 3, requires_grad=True)  # kept, though 0
    percentile_mask(zeros, 0.5, backend=backend)[0].sum().backward()
    assert (zeros.grad == 1).all()


RAW_MASKS = {
    "rows": torch.randn(6, 35),
    "one-row": torch.randn(1, 5000),
    "transposed": torch.randn(35, 6).t(),
    "repeated": torch.randn(1, 35).expand(6, 35),
    "no-rows": torch.randn(0, 35),
}


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", RAW_MASKS)
def test_opcheck_of_the_percentile_mask(name: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(OPS["percentile_mask"], (RAW_MASKS[name].to(dtype), 0.7))


def raw_step(
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (2, 4, 5, 7),
    *,
    masked: bool = True,
) -> raw.Arguments:
    """Arguments of a raw call that is right in every respect."""
    eps = torch.randn(5, *shape, dtype=torch.float64).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    mask = torch.rand(shape[2:], dtype=wide).expand(3, *shape) if masked else None
    tensors = {
        "eps_uncond": eps[0],
        "eps_text": eps[1],
        "eps_edits": eps[2:],
        "momentum": torch.randn(shape).to(wide),
    }
    return {**tensors, **raw_options(OPTIONS), "user_mask": mask, "sum_channels": masked}


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 4, 5, 7), (2, 4), (0, 4, 5, 7)])
def test_opcheck_of_sega_guidance(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for masked in (False, True):
        positional, by_name = raw.select("sega_guidance", raw_step(dtype, shape, masked=masked))
        torch.library.opcheck(OPS["sega_guidance"], positional, by_name)


def spoiled(good: Tensor) -> list[Tensor]:
    """Wrong ranks, lengths, dtypes and devices of a tensor argument."""
    wrong = [good[None, None, None], good[..., 0], good.new_zeros(0), good.new_zeros(())]
    wrong += [
        good.new_zeros(*good.shape[:-1], good.shape[-1] + 3),
        good.new_zeros(good.shape[0] + 1, *good.shape[1:]),
    ]
    wrong += [good.new_zeros(good.shape[0], good.shape[1] + 1, *good.shape[2:])]
    wrong += [
        good.to(dtype)
        for dtype in (torch.float64, torch.int64, torch.bool, torch.float16, torch.complex64)
    ]
    return [*wrong, good.to("meta"), good.to_sparse()]


@needs_cpu_kernels
@pytest.mark.parametrize(
    "argument", ["eps_uncond", "eps_text", "eps_edits", "momentum", "user_mask"]
)
def test_raw_steps_refuse_tensors(argument: str) -> None:
    good = raw_step()
    raw.call("sega_guidance", good)
    wrong = spoiled(good[argument].contiguous())
    wrong.append(good[argument].mT.contiguous().mT)  # the trailing axes do not collapse
    for value in wrong:
        with pytest.raises(
            RuntimeError, match=r" must .+, got " if value.layout == torch.strided else "."
        ):
            raw.call("sega_guidance", {**good, argument: value})


@needs_cpu_kernels
@pytest.mark.parametrize("argument", RAW_LISTS)
def test_raw_steps_refuse_lists(argument: str) -> None:
    good = raw_step()
    for values in ([], good[argument][:2], good[argument] * 2):
        with pytest.raises(RuntimeError, match=f"{argument} must .+, got "):
            raw.call("sega_guidance", {**good, argument: values})
    if argument == "edit_threshold":
        for level in (-0.1, 1.1, float("nan")):
            with pytest.raises(RuntimeError, match=r"edit_threshold must .+, got "):
                raw.call("sega_guidance", {**good, argument: [0.5, level, 0.5]})


@needs_cpu_kernels
def test_raw_masks_refuse() -> None:
    good = torch.randn(6, 35)
    for value in spoiled(good)[:4] + [
        good.to(dtype) for dtype in (torch.int64, torch.bool, torch.complex64)
    ]:
        with pytest.raises(RuntimeError, match=r"x must .+, got "):
            OPS["percentile_mask"](value, 0.5)
    with pytest.raises(RuntimeError, match=r"x must .+, got "):
        OPS["percentile_mask"](torch.randn(6, 0), 0.5)
    for level in (-0.1, 1.1, float("nan"), float("inf")):
        with pytest.raises(RuntimeError, match=r"level must .+, got "):
            OPS["percentile_mask"](good, level)


def example() -> list[Tensor]:
    """eps_uncond, eps_text, eps_edits, momentum and user_mask."""
    shapes = ((2, 4, 6, 5), (2, 4, 6, 5), (3, 2, 4, 6, 5), (2, 4, 6, 5), (6, 1))
    return [torch.randn(shape, requires_grad=True) for shape in shapes]


def step(*tensors: Tensor, backend: str, number: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Both ops, with work before and after."""
    options = {
        **OPTIONS,
        "guidance_scale": number,
        "edit_guidance_scale": number,
        "warm": [True, False, True],
    }
    options["edit_threshold"] = [number / 4, 0.5, 0.5]
    uncond, *others, mask = tensors
    eps, momentum = sega_guidance(uncond * 2, *others, **options, user_mask=mask, backend=backend)
    return *percentile_mask(eps, number / 5, backend=backend), momentum


def loss_of(call: Callable, leaves: list[Tensor]) -> list[Tensor]:
    masked, threshold, momentum = call(*leaves)
    return [
        masked,
        threshold,
        momentum,
        *torch.autograd.grad(masked.square().sum() + momentum.sum(), leaves),
    ]


@pytest.mark.costly
@every_backend
@pytest.mark.parametrize(
    ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", None)]
)
def test_compile_forward_and_backward(backend: str, compiler: str, dynamic: bool | None) -> None:
    if backend == "reference" and (compiler, dynamic) != ("aot_eager", False):
        pytest.skip("the reference is plain PyTorch, which one compiler shows")
    torch._dynamo.reset()
    compiled = torch.compile(
        partial(step, backend=backend), fullgraph=True, backend=compiler, dynamic=dynamic
    )
    for number in (2.0, 1.5)[: 1 if compiler == "inductor" else 2]:  # recompiled for each number
        leaves = example()
        got = loss_of(partial(compiled, number=number), leaves)
        for result, expected in zip(
            got, loss_of(partial(step, backend=backend, number=number), leaves)
        ):
            torch.testing.assert_close(result, expected)
    with torch.no_grad():
        for result, expected in zip(
            compiled(*leaves, number=number), step(*leaves, backend=backend, number=number)
        ):
            torch.testing.assert_close(result, expected)


@every_backend
def test_compile_takes_one_tensor_twice(backend: str) -> None:
    torch._dynamo.reset()
    call = partial(sega_guidance, **{**OPTIONS, "warm": True}, backend=backend)
    compiled = torch.compile(
        lambda x, edits: call(x, x, edits, x), fullgraph=True, backend="aot_eager"
    )
    x, edits = torch.randn(2, 3, 20, requires_grad=True), torch.randn(3, 2, 3, 20)
    for result, expected in zip(compiled(x, edits), call(x, x, edits, x)):
        torch.testing.assert_close(result, expected)


@every_backend
def test_export(backend: str) -> None:
    class Step(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return step(*tensors, backend=backend)

    program = torch.export.export(Step(), tuple(example()))
    others = example()
    for result, expected in zip(program.module()(*others), Step()(*others)):
        torch.testing.assert_close(result, expected)


@every_backend
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # vmap calls a kernel once for each
def test_functional_transforms(backend: str) -> None:
    x = torch.randn(4, 3, 20)
    mask = partial(percentile_mask, level=0.6, dim=-1, backend=backend)
    kept = (mask(x)[0] != 0).float()
    assert torch.equal(torch.func.grad(lambda x: mask(x)[0].sum())(x), kept)
    assert torch.equal(torch.vmap(lambda x: mask(x)[0])(x), mask(x)[0])
    assert torch.equal(torch.vmap(torch.func.grad(lambda x: mask(x)[0].sum()))(x), kept)
    if backend == "reference":  # torch's own operators
        assert torch.equal(torch.func.jvp(lambda x: mask(x)[0], (x,), (x,))[1], mask(x)[0])
    else:
        with pytest.raises(RuntimeError, match="jvp"):  # and not the derivative 0
            torch.func.jvp(lambda x: mask(x)[0], (x,), (x,))
    stacked = [torch.stack([x, x * 2]) for x in example()[:4]]
    call = partial(sega_guidance, **{**OPTIONS, "warm": True}, backend=backend)
    for together, one in zip(torch.vmap(call)(*stacked), call(*(x[1] for x in stacked))):
        torch.testing.assert_close(together[1], one)


@every_backend
def test_inference_mode_and_meta_tensors(backend: str) -> None:
    with torch.inference_mode():
        results = step(*example(), backend=backend)
    assert not any(x.requires_grad for x in results)
    meta = [x.to("meta") for x in example()]
    for result, expected in zip(step(*meta, backend="auto"), results):
        assert result.shape == expected.shape
        assert result.dtype == expected.dtype


@every_backend
def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    leaves = [x.detach() for x in example()]
    leaves[1].requires_grad_()
    eps = sega_guidance(*leaves[:4], **OPTIONS, user_mask=leaves[4], backend=backend)[0]
    eps.backward(torch.ones_like(eps))
    torch.testing.assert_close(leaves[1].grad, torch.full_like(eps, 7.5))
    assert leaves[0].grad is None
