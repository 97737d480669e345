"""PyTorch's machinery around the op: opcheck, compile, export, autocast, vmap, determinism."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import raw
import torch
from cases import MODULATIONS, Case, backends, make_inputs, why_skip
from torch import Tensor

from dense_attn import layout_attention

needs_cpu_kernels = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
on_cpu = pytest.mark.parametrize("backend", backends("cpu", "reference"))
CHECKED_ELSEWHERE = ("sega/test_framework.py", "reversible/test_raw_calls.py")
CALLS = {  # what a raw call may look like
    "plain": Case("raw", (2, 2, 37, 53, 40)),
    "strided": Case("raw", (2, 2, 37, 53, 40), view="transposed", words="per-sample"),
    "some-keys": Case("raw", (3, 4, 37, 53, 40), keys=(0, 7, 53), group=2),
    "no-keys": Case("raw", (2, 2, 37, 0, 40)),
    "no-queries": Case("raw", (2, 2, 0, 53, 40)),
}


def raw_arguments(
    case: Case, dtype: torch.dtype, modulation: str, *, ordered: bool
) -> raw.Arguments:
    """The arguments of the two registered ops for a case."""
    x = make_inputs(case, dtype)
    arguments = {name: getattr(x, name) for name in ("q", "k", "v", "q_regions", "k_regions")}
    arguments |= {
        "strength": x.strength.expand(x.q.shape[:3]),
        "modulation": modulation,
        "scale": 0.25,
    }
    arguments |= dict.fromkeys(("tiles", "counts", "k_words"))
    arguments["seqlens_k"] = x.k_mask
    for name, tokens in (("q_order", x.q), ("k_order", x.k)):
        arguments[name] = torch.randperm(tokens.shape[2]).int() if ordered else None
    return raw.with_saved(arguments, grad_out=x.grad_out, grad_lse=x.grad_lse if ordered else None)


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("modulation", ["range", "mask"])
def test_opcheck(name: str, dtype: torch.dtype, modulation: str) -> None:
    """Opcheck's four utilities: schema, autograd registration, fake tensors, dynamic shapes."""
    arguments = raw_arguments(CALLS[name], dtype, modulation, ordered=name == "plain")
    torch.library.opcheck(
        torch.ops.dense_attn.layout_attention_fwd.default, *raw.select(raw.FWD, arguments)
    )
    torch.library.opcheck(
        torch.ops.dense_attn.layout_attention_bwd.default, *raw.select(raw.BWD, arguments)
    )


def test_every_registered_op_is_checked() -> None:
    here, folder = {raw.FWD, raw.BWD}, Path(__file__).parents[1]
    others = {
        op
        for file in CHECKED_ELSEWHERE
        for op in raw.registered()
        if op in (folder / file).read_text()
    }
    assert all("opcheck" in (folder / file).read_text() for file in CHECKED_ELSEWHERE)
    assert raw.registered() == (here | others if why_skip("cpu") is None else set())


def loss_of(call: Callable, leaves: list[Tensor]) -> list[Tensor]:
    out, lse = call(*leaves)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), leaves)]


@pytest.mark.costly
@on_cpu
@pytest.mark.parametrize(
    ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", None)]
)
def test_compile_forward_and_backward(backend: str, compiler: str, dynamic: bool | None) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, strength: Tensor) -> tuple[Tensor, Tensor]:
        words = torch.arange(q.shape[2], dtype=torch.int32) % 4
        return layout_attention(
            q * 2, k, v, words, words, strength, return_lse=True, backend=backend
        )

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=compiler, dynamic=dynamic)
    for tokens in (24, 40):
        leaves = [torch.randn(2, 2, tokens, 16, requires_grad=True) for _ in range(3)]
        leaves.append(torch.rand(tokens, requires_grad=True))
        for result, expected in zip(loss_of(compiled, leaves), loss_of(call, leaves)):
            largest = (
                expected.abs().max().item()
            )  # Inductor sums in another order: what cancels leaves its rounding
            torch.testing.assert_close(result, expected, rtol=1.3e-6, atol=1e-5 * max(1.0, largest))


@on_cpu
def test_compile_backward_of_out_alone(backend: str) -> None:
    """Where no lse is asked for the compiler has a gradient of it all the same."""

    def call(q: Tensor, words: Tensor) -> Tensor:
        return layout_attention(q, q, q, words, words, 0.5, backend=backend)

    torch._dynamo.reset()
    q = torch.randn(2, 2, 24, 16, requires_grad=True)
    words = torch.arange(24, dtype=torch.int32) % 4
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    (grad,) = torch.autograd.grad(compiled(q, words).square().sum(), q)
    torch.testing.assert_close(grad, torch.autograd.grad(call(q, words).square().sum(), q)[0])


@on_cpu
def test_compile_with_numbers_that_change(backend: str) -> None:
    """strength is another number at every denoising step."""

    def call(q: Tensor, words: Tensor, strength: float, scale: float) -> Tensor:
        return layout_attention(q, q, q, words, words, strength, scale=scale, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    q, words = torch.randn(2, 2, 24, 16), torch.arange(24, dtype=torch.int32) % 4
    for number in (0.1, 0.2, 0.35, 0.9):
        torch.testing.assert_close(
            compiled(q, words, number, number), call(q, words, number, number)
        )


def test_meta_tensors_give_shapes() -> None:
    q, words = (
        torch.empty(2, 3, 5, 8, device="meta"),
        torch.empty(5, dtype=torch.int32, device="meta"),
    )
    assert layout_attention(q, q, q, words, words).shape == q.shape


@on_cpu
@pytest.mark.parametrize("modulation", MODULATIONS)
def test_export(backend: str, modulation: str) -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, words: Tensor) -> Tensor:
            return layout_attention(
                q, k, v, words, words, 0.5, modulation=modulation, backend=backend
            )

    inputs = (*torch.randn(3, 2, 2, 24, 16).unbind(0), torch.arange(24, dtype=torch.int32) % 4)
    program = torch.export.export(Attention(), inputs)
    others = (*torch.randn(3, 2, 2, 24, 16).unbind(0), torch.arange(24, dtype=torch.int32) % 3)
    torch.testing.assert_close(program.module()(*others), Attention()(*others))


@on_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(backend: str, dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 2, 24, 16).unbind(0)
    words = torch.arange(24, dtype=torch.int32) % 4
    call = partial(
        layout_attention, q_regions=words, k_regions=words, backend=backend, return_lse=True
    )
    with torch.autocast("cpu", dtype):
        out, lse = call(q.requires_grad_(), k.to(dtype), v)
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    expected, expected_lse = call(q.to(dtype), k.to(dtype), v.to(dtype))
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    out.sum().backward()
    assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype):
        assert call(*(x.double() for x in (q, k, v)))[0].dtype == torch.float64


@needs_cpu_kernels
def test_vmap_is_refused() -> None:
    q = torch.randn(3, 2, 2, 24, 16)
    words = torch.zeros(24, dtype=torch.int32)
    with pytest.raises(
        NotImplementedError, match="layout_attention must be called outside of vmap"
    ):
        torch.vmap(lambda x: layout_attention(x, x, x, words, words, backend="cpu"))(q)


@on_cpu
@pytest.mark.parametrize("kind", [Tensor.bool, Tensor.float, lambda mask: mask[:, :2].int()])
def test_vmap_of_a_mask_is_refused(backend: str, kind: Callable) -> None:
    q = torch.randn(2, 2, 24, 16)
    words = torch.zeros(24, dtype=torch.int32)
    masks = kind(torch.arange(72).view(3, 24) % 2)
    with pytest.raises(
        NotImplementedError, match="layout_attention must be called outside of vmap"
    ):
        torch.vmap(lambda m: layout_attention(q, q, q, words, words, k_mask=m, backend=backend))(
            masks
        )


@on_cpu
def test_deterministic_mode(backend: str, poisoned_memory: None) -> None:
    leaves = [torch.randn(2, 2, 24, 16, requires_grad=True) for _ in range(3)]
    words = torch.arange(24, dtype=torch.int32) % 4
    out = layout_attention(*leaves, words, words, backend=backend)
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


@on_cpu
def test_inference_mode(backend: str) -> None:
    words = torch.arange(24, dtype=torch.int32) % 4
    with torch.inference_mode():
        q = torch.randn(2, 2, 24, 16)
        out = layout_attention(q, q, q, words, words, backend=backend)
    assert not out.requires_grad
    assert out.isfinite().all()
