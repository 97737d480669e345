"""Gradients: against finite differences, once only, the same bits on every run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from accuracy import assert_accurate, evaluate, exact_and_plain
from cases import MODULATIONS, Case, backends, make_inputs
from torch import Tensor

from dense_attn import layout_attention

DIFFERENTIABLE = partial(pytest.mark.parametrize, "modulation", MODULATIONS)
KERNELS = backends("cpu")
CASE = Case("gradients", (2, 3, 130, 150, 40))


def small_problem() -> tuple[list[Tensor], Callable]:
    """Leaves q, k, v, strength in float64 and the call that takes them."""
    shapes = ((2, 2, 5, 3), (2, 2, 7, 3), (2, 2, 7, 3), (2, 1, 5))
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    words = [torch.randint(0, 4, (n,), dtype=torch.int32) for n in (5, 7)]

    def call(
        q: Tensor, k: Tensor, v: Tensor, strength: Tensor, **options: object
    ) -> tuple[Tensor, Tensor]:
        out, lse = layout_attention(q, k, v, *words, strength, return_lse=True, **options)
        return out, lse.masked_fill(
            lse == -torch.inf, 0
        )  # finite differences of -inf are no numbers

    return leaves, call


@pytest.mark.parametrize("backend", backends("reference", "cpu"))
@DIFFERENTIABLE()
def test_gradcheck(backend: str, modulation: str) -> None:
    leaves, call = small_problem()
    assert torch.autograd.gradcheck(partial(call, modulation=modulation, backend=backend), leaves)


@DIFFERENTIABLE()
def test_the_reference_is_differentiable_twice(modulation: str) -> None:
    leaves, call = small_problem()
    assert torch.autograd.gradgradcheck(
        partial(call, modulation=modulation, backend="reference"), leaves
    )


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize(
    "loss", [torch.sum, lambda out: out.square().sum()], ids=["sum", "squares"]
)
def test_a_kernel_refuses_a_second_derivative(backend: str, loss: Callable) -> None:
    """Gradients of constant gradients too, where q, k and v alone remain to be differentiated."""
    leaves, call = small_problem()
    out, _ = call(*leaves, backend=backend)
    grads = torch.autograd.grad(loss(out), leaves, create_graph=True)
    with pytest.raises(
        RuntimeError, match="layout_attention must be differentiated once, got a second derivative"
    ):
        grads[0].sum().backward()


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@DIFFERENTIABLE()
def test_two_runs_give_the_same_bits(backend: str, dtype: torch.dtype, modulation: str) -> None:
    inputs = make_inputs(CASE, dtype)
    attention = partial(layout_attention, modulation=modulation, backend=backend, return_lse=True)
    first, second = evaluate(attention, inputs), evaluate(attention, inputs)
    for name, result in first.items():
        assert torch.equal(result, second[name]), name


@pytest.mark.parametrize("backend", backends("cpu"))
@DIFFERENTIABLE()
def test_every_number_of_threads_obeys_the_rule(backend: str, modulation: str) -> None:
    inputs = make_inputs(CASE, torch.float32)
    exact, plain = exact_and_plain(inputs, modulation=modulation)
    attention = partial(layout_attention, modulation=modulation, backend=backend, return_lse=True)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for name, result in evaluate(attention, inputs).items():
                assert_accurate(name, result, exact[name], plain[name], torch.float32)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", backends("reference", "cpu"))
def test_the_gradient_of_a_tie_goes_to_its_first_key(backend: str) -> None:
    """Keys 1 and 2 tie for the maximum, 3 and 4 for the minimum; dk shows which one moved it."""
    q = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    k = torch.tensor([0.0, 1, 1, -1, -1], dtype=torch.float64).view(1, 1, 5, 1).requires_grad_()
    v = torch.arange(5.0, dtype=torch.float64).view(1, 1, 5, 1)
    q_regions, k_regions = (
        torch.ones(1, dtype=torch.int32),
        torch.tensor([1, 0, 0, 0, 0], dtype=torch.int32),
    )
    out = layout_attention(q, k, v, q_regions, k_regions, 0.5, backend=backend)
    (dk,) = torch.autograd.grad(out.sum(), k)
    # Had the tied keys shared the extreme's gradient, equal keys with gradients linear in v would
    # have lost this gap.
    probability = torch.softmax(torch.tensor([0.5, 0.0, 0.0, -1.0, -1.0], dtype=torch.float64), 0)
    flow = probability * (v.flatten() - out.item())  # ds'
    expected = 0.5 * flow
    expected[1] += 0.5 * flow[0]
    expected[3] -= 0.5 * flow[0]
    torch.testing.assert_close(dk.flatten(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", KERNELS)
def test_only_the_gradients_that_are_wanted(backend: str) -> None:
    inputs = make_inputs(CASE, torch.float32)
    q = inputs.q.requires_grad_()
    out = layout_attention(
        q, inputs.k, inputs.v, inputs.q_regions, inputs.k_regions, 0.5, backend=backend
    )
    out.backward(inputs.grad_out)
    assert q.grad.shape == q.shape
    assert inputs.k.grad is None
