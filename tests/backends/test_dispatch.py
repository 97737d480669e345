"""Dispatch of layout attention: what a call does not pay for, and what is refused all the same."""

from __future__ import annotations

import inspect
import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType

import pytest
import torch
from cases import why_skip
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from dense_attn import ddim_step, layout_attention
from dense_attn._backends import dispatch, table
from dense_attn.layout_attention import op

pytestmark = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
WORDS = torch.arange(6, dtype=torch.int32) % 4


def leaves(*, grad: bool) -> list[Tensor]:
    return [torch.randn(1, 2, 6, 8, requires_grad=grad) for _ in range(3)]


def attention(q: Tensor, k: Tensor, v: Tensor, backend: str = "cpu") -> Tensor:
    return layout_attention(q, k, v, WORDS, WORDS, 0.5, backend=backend)


def counted(call: Callable[[], object]) -> Counter:
    """How often autograd's apply, and any function of inspect, is called meanwhile."""
    found: Counter = Counter()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "c_call" and getattr(argument, "__name__", "") == "apply":
            found["apply"] += 1
        elif event == "call" and frame.f_code.co_filename == inspect.__file__:
            found["inspect"] += 1

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def test_without_a_gradient_nothing_is_recorded() -> None:
    plain, wanted = leaves(grad=False), leaves(grad=True)
    assert counted(lambda: attention(*plain)) == {}
    with torch.no_grad():
        assert counted(lambda: attention(*wanted)) == {}
    assert counted(lambda: attention(*wanted, backend="reference")) == {}  # torch's own operators


def test_with_a_gradient_one_function_is_recorded_and_no_argument_bound() -> None:
    tensors = leaves(grad=True)
    assert counted(lambda: attention(*tensors)) == {"apply": 1}
    strength = torch.rand(6, requires_grad=True)
    plain = leaves(grad=False)
    assert counted(lambda: layout_attention(*plain, WORDS, WORDS, strength, backend="cpu")) == {
        "apply": 1
    }


def test_gradients_are_those_of_the_plain_function() -> None:
    tensors, strength = leaves(grad=True), torch.rand(1, 2, 6, requires_grad=True)
    rule = strength, "range", 0.3, *[None] * 5, 1.0, True, True, None
    inputs = (*tensors, WORDS, WORDS, *rule, "cpu")
    found = []
    for run in (lambda *x: dispatch.run(op._LayoutAttention, *x), op._LayoutAttention.apply):
        out, lse, *_ = run(*inputs)
        found.append(torch.autograd.grad(out.cos().sum() + lse.sum(), [*tensors, strength]))
    for got, expected in zip(*found, strict=True):
        assert torch.equal(got, expected)


def test_forward_mode_is_refused() -> None:
    """A bare kernel would answer with the derivative 0."""
    q, k, v = leaves(grad=False)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: attention(x, k, v), (q,), (q,))


def test_vmap_is_refused() -> None:
    q, k, v = leaves(grad=False)
    with pytest.raises(NotImplementedError, match="must be called outside of vmap"):
        torch.vmap(lambda x: attention(x, k, v))(torch.stack([q, q]))


def test_the_gradient_of_a_transform_is_the_eager_one() -> None:
    q, k, v = leaves(grad=True)
    (expected,) = torch.autograd.grad(attention(q, k, v).sum(), q)
    assert torch.equal(torch.func.grad(lambda x: attention(x, k, v).sum())(q), expected)


def test_a_tensor_that_outlived_its_transform_is_taken() -> None:
    """Which torch.autograd.Function unwraps, and the kernels must too."""
    kept, (q, k, v) = [], leaves(grad=True)
    torch.func.grad(lambda x: (kept.append(x), x.sum())[1])(q.detach())
    out = attention(kept[0], k, v)
    assert torch.equal(out, attention(q, k, v))
    assert all(x.isfinite().all() for x in torch.autograd.grad(out.sum(), (k, v)))


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_without_graph_breaks(grad: bool) -> None:
    tensors = leaves(grad=grad)
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*tensors), attention(*tensors))


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("lse", [False, True])
def test_what_no_gradient_needs_is_not_written(grad: bool, lse: bool) -> None:
    """Neither by a plain call nor by a compiled one."""
    shapes = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        return layout_attention(q, k, v, WORDS, WORDS, 0.5, return_lse=lse, backend="cpu")

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(
            self, op: object, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            results = op(*args, **(kwargs or {}))
            if "layout_attention_fwd" in str(op):
                shapes.append(tuple(tuple(x.shape) for x in results))
            return results

    def watched(graph: Callable, _: object) -> Callable:
        def run(*tensors: Tensor) -> object:
            with Watched():
                return graph(*tensors)

        return make_boxed_func(run)

    tensors = leaves(grad=grad)
    with Watched():
        attend(*tensors)
    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=watched)
    torch.compile(attend, fullgraph=True, backend=backend)(*tensors)
    expected = ((1, 2, 6, 8), (1, 2, 6) if lse else (0,), (1, 2, 6, 4) if grad else (0,))
    assert shapes == [expected] * 2


def test_a_second_derivative_is_refused() -> None:
    q, k, v = leaves(grad=True)
    (grad,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="must be differentiated once, got a second derivative"):
        grad.sum().backward()


def test_the_reference_has_second_derivatives() -> None:
    q, k, v = (x.double() for x in leaves(grad=True))
    out = attention(q, k, v, "reference").square().sum()
    (grad,) = torch.autograd.grad(out, q, create_graph=True)
    assert torch.autograd.grad(grad.sum(), q)[0].abs().max() > 0


@pytest.mark.parametrize("name", ["cpu", "reference", "triton"])
def test_a_namespace_has_every_op_or_says_that_it_lacks_it(name: str) -> None:
    kernels = table.NAMESPACES[name]
    if kernels.LOAD_ERROR is not None:
        pytest.skip(kernels.LOAD_ERROR)
    from dense_attn._backends import ops

    there = {op for op in ops.OPS if callable(getattr(kernels, op, None))}
    assert ops.OPS.keys() - kernels.NO_KERNELS <= there
    assert isinstance(kernels.AUTOGRAD, bool)


def test_what_a_finished_transform_has_left_asks_for_no_gradient() -> None:
    kept, x = [], torch.randn(3)
    torch.func.grad(lambda x: (kept.append(x * 1.0), x.sum())[1])(x)
    step = ddim_step(kept[0], x, 0.5, 0.6, backend="cpu")
    assert not step.requires_grad
    assert torch.equal(step, ddim_step(x, x, 0.5, 0.6, backend="cpu"))
