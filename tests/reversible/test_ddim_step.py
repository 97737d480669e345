"""ddim_step and its inverse: formula, guidance, gradients of every order, compiling, refusals."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from cases import backends
from torch import Tensor

from dense_attn import ddim_step, ddim_step_inverse
from dense_attn.verify.accuracy import judge

GRAMMAR = re.compile(r"[a-z_]+ must .+, got .+", re.DOTALL)
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
on_cpu = pytest.mark.parametrize("backend", backends("reference", "cpu"))
both = pytest.mark.parametrize("step", [ddim_step, ddim_step_inverse])


def direct(step: Callable, x: Tensor, eps: Tensor, now: float, prev: float) -> Tensor:
    """DDIM by way of the predicted image; the inverse is the step from prev to t."""
    if step is ddim_step_inverse:
        now, prev = prev, now
    return prev**0.5 * (x - (1 - now) ** 0.5 * eps) / now**0.5 + (1 - prev) ** 0.5 * eps


@on_cpu
@both
@pytest.mark.parametrize("eps_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guided", [False, True])
def test_the_formula(
    step: Callable, dtype: torch.dtype, eps_dtype: torch.dtype, guided: bool, backend: str
) -> None:
    x, eps, uncond = torch.randn(3, 2, 4, 9, 7).unbind()
    x, eps, uncond = x.to(dtype), eps.to(eps_dtype), uncond.to(eps_dtype)
    options = {"eps_uncond": uncond, "guidance_scale": 7.5} if guided else {}
    got = step(x, eps, 0.3, 0.4, **options, backend=backend)
    wide = eps.double() if not guided else uncond.double() + 7.5 * (eps.double() - uncond.double())
    exact = direct(step, x.double(), wide, 0.3, 0.4)
    plain = step(x, eps, 0.3, 0.4, **options, backend="reference")
    assert got.dtype == dtype
    error, allowed = judge(got, exact, plain, dtype)
    assert error <= allowed
    error, allowed = judge(step(x, eps, 0.3, 0.41, **options, backend=backend), exact, plain, dtype)
    assert error > allowed  # the negative control


@on_cpu
@both
def test_gradients_of_every_order(step: Callable, backend: str) -> None:
    def call(x: Tensor, eps: Tensor, uncond: Tensor) -> Tensor:
        return step(x, eps, 0.3, 0.4, eps_uncond=uncond, guidance_scale=3.0, backend=backend).sin()

    leaves = tuple(torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True).unbind())
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)
    assert torch.autograd.gradcheck(
        lambda x, eps: step(x, eps, 0.3, 0.4, backend=backend), leaves[:2]
    )


@on_cpu
def test_gradients_have_their_own_dtypes(backend: str) -> None:
    x, eps = (
        torch.randn(4, requires_grad=True),
        torch.randn(4, dtype=torch.bfloat16, requires_grad=True),
    )
    ddim_step(x, eps, 0.3, 0.4, backend=backend).sum().backward()
    assert (x.grad.dtype, eps.grad.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(x.grad, torch.full((4,), (0.4 / 0.3) ** 0.5))


@pytest.mark.costly
@on_cpu
@both
@pytest.mark.parametrize(
    ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", None)]
)
def test_compile(step: Callable, compiler: str, dynamic: bool | None, backend: str) -> None:
    def call(x: Tensor, eps: Tensor, now: float, prev: float) -> Tensor:
        guided = step(x * 2, eps, now, prev, eps_uncond=x, guidance_scale=2.0, backend=backend)
        return step(guided, guided, now, prev, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler, dynamic=dynamic)
    for size, now, prev in ((24, 0.1, 0.2), (40, 0.3, 0.5), (40, 0.7, 0.75), (56, 0.9, 1.0)):
        leaves = [torch.randn(2, size, requires_grad=True) for _ in range(2)]
        got, expected = compiled(*leaves, now, prev), call(*leaves, now, prev)
        torch.testing.assert_close(got, expected)
        grads = (torch.autograd.grad(out.square().sum(), leaves) for out in (got, expected))
        torch.testing.assert_close(*grads)


@on_cpu
@both
def test_any_memory(step: Callable, backend: str) -> None:
    wide, eps = torch.randn(2, 4, 6, 10), torch.randn(2, 4, 6, 5)
    expected = step(wide[..., ::2].contiguous(), eps, 0.3, 0.4, backend=backend)
    for x in (wide[..., ::2], wide[..., ::2].contiguous(memory_format=torch.channels_last)):
        for other in (
            eps,
            eps.mT.contiguous().mT,
            eps.contiguous(memory_format=torch.channels_last),
        ):
            got = step(x, other, 0.3, 0.4, backend=backend)
            assert torch.equal(got, expected)
            assert got.stride() == torch.empty_like(x).stride()
    assert step(wide[0, 0, 0, 0], eps[0, 0, 0, 0], 0.3, 0.4, backend=backend).shape == ()
    assert step(wide[:0], torch.randn(0, 4, 6, 10), 0.3, 0.4, backend=backend).shape == (
        0,
        4,
        6,
        10,
    )
    expanded = eps[:1, :1].expand(2, 4, 6, 5)
    assert torch.equal(
        step(expanded, expanded, 0.3, 0.4, backend=backend),
        step(expanded.contiguous(), expanded.contiguous(), 0.3, 0.4, backend=backend),
    )


@on_cpu
def test_alphas_as_tensors_and_the_ends_of_their_range(backend: str) -> None:
    x, eps = torch.randn(2, 5).unbind()
    alphas = torch.tensor([0.3, 0.4], dtype=torch.float64)
    assert torch.equal(
        ddim_step(x, eps, *alphas, backend=backend), ddim_step(x, eps, 0.3, 0.4, backend=backend)
    )
    clean = ddim_step(x, eps, 0.25, 1, backend=backend)
    torch.testing.assert_close(clean, (x - 0.75**0.5 * eps) / 0.5)
    torch.testing.assert_close(ddim_step_inverse(clean, eps, 0.25, 1, backend=backend), x)


@on_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_coefficients_beyond_float32_are_refused(dtype: torch.dtype, backend: str) -> None:
    x = torch.ones(2, dtype=dtype)
    calls = (
        (ddim_step, 1e-90, 0.5, "alpha_bar_t"),
        (ddim_step_inverse, 0.5, 1e-90, "alpha_bar_prev"),
    )
    for step, now, prev, argument in calls:
        if dtype == torch.float64:
            assert step(x, x, now, prev, backend=backend).isfinite().all()
            continue
        rule = "be large enough for coefficients that are finite in float32"
        message = f"{argument} must {rule}, got 1e-90"
        with pytest.raises(ValueError, match=message):
            step(x, x, now, prev, backend=backend)
    assert ddim_step(x, x, 0.5, 1e-90, backend=backend).isfinite().all()


def test_meta_tensors_and_vmap() -> None:
    x = torch.empty(2, 3, device="meta")
    assert ddim_step(x, x, 0.3, 0.4).shape == (2, 3)
    x = torch.randn(2, 3)
    if backends("cpu")[0].marks:
        pytest.skip("no CPU kernels")
    with pytest.raises(NotImplementedError, match="ddim_step must be called outside of vmap"):
        torch.vmap(lambda x: ddim_step(x, x, 0.3, 0.4, backend="cpu"))(x)


GOOD = {"x": torch.randn(2, 3), "eps": torch.randn(2, 3), "alpha_bar_t": 0.3, "alpha_bar_prev": 0.4}
BAD_CALLS = [
    ("x", [1.0], TypeError, "x must be a tensor, got list"),
    (
        "x",
        torch.ones(2, 3, dtype=torch.int64),
        TypeError,
        "x must be one of float32, bfloat16, float16, float64",
    ),
    ("x", torch.randn(3), ValueError, "eps must have x's shape (3,), got (2, 3)"),
    ("eps", None, TypeError, "eps must be a tensor, got NoneType"),
    ("eps", torch.ones(2, 3) > 0, TypeError, "eps must be one of float32"),
    ("eps", torch.randn(1, 3), ValueError, "eps must have x's shape (2, 3), got (1, 3)"),
    (
        "eps",
        torch.randn(2, 3, device="meta"),
        ValueError,
        "eps must be on x's device cpu, got meta",
    ),
    ("eps", torch.randn(2, 3).to_sparse(), TypeError, "eps must be a strided tensor"),
    (
        "eps_uncond",
        torch.randn(2, 3).half(),
        TypeError,
        "eps_uncond must have eps's dtype float32, got float16",
    ),
    ("eps_uncond", torch.randn(3), ValueError, "eps_uncond must have eps's shape (2, 3), got (3,)"),
    ("eps_uncond", 0.0, TypeError, "eps_uncond must be a tensor, got float"),
    ("alpha_bar_t", 0, ValueError, "alpha_bar_t must be in (0, 1], got 0"),
    ("alpha_bar_t", 1.01, ValueError, "alpha_bar_t must be in (0, 1], got 1.01"),
    ("alpha_bar_t", float("nan"), ValueError, "alpha_bar_t must be finite, got nan"),
    ("alpha_bar_t", "0.5", TypeError, "alpha_bar_t must be a number or a 0-d tensor, got str"),
    (
        "alpha_bar_t",
        torch.tensor([0.3]),
        TypeError,
        "alpha_bar_t must be a number or a 0-d tensor, got Tensor",
    ),
    (
        "alpha_bar_prev",
        torch.tensor(-0.5),
        ValueError,
        "alpha_bar_prev must be in (0, 1], got -0.5",
    ),
    (
        "alpha_bar_prev",
        torch.tensor(1),
        TypeError,
        "alpha_bar_prev must be a number or a 0-d tensor, got Tensor",
    ),
    (
        "guidance_scale",
        float("inf"),
        ValueError,
        "guidance_scale must be finite in float32, got inf",
    ),
    ("guidance_scale", 1e300, ValueError, "guidance_scale must be finite in float32, got 1e+300"),
    (
        "alpha_bar_t",
        torch.ones((), device="meta"),
        ValueError,
        "alpha_bar_t must hold values, got a meta tensor",
    ),
    ("guidance_scale", None, TypeError, "guidance_scale must be a number, got NoneType"),
    (
        "backend",
        "opencl",
        ValueError,
        "backend must be one of auto, cuda, triton, cpu, reference, got 'opencl'",
    ),
]


@on_cpu
@both
@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    BAD_CALLS,
    ids=[f"{call[0]}-{i}" for i, call in enumerate(BAD_CALLS)],
)
def test_a_bad_argument_is_named(
    step: Callable, argument: str, value: object, error: type[Exception], message: str, backend: str
) -> None:
    step(**GOOD, backend=backend)
    with pytest.raises(error) as refusal:
        step(**{**GOOD, "backend": backend, argument: value})
    assert type(refusal.value) is error
    assert GRAMMAR.fullmatch(str(refusal.value))
    assert message in str(refusal.value)


def test_a_whole_compiled_graph_still_says_what_is_refused() -> None:
    call = torch.compile(
        lambda x: ddim_step(x, x[:, :1], 0.5, 0.6), fullgraph=True, backend="eager"
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="eps must have x's shape"):
        call(torch.randn(1, 2, 4))
