"""Behaviour that only a GPU shows: graphs, Inductor, no waiting, large offsets, streams."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cases import DEVICES, INTERPRETED, Case, make_inputs, moved, why_skip
from chains import Network, sampler
from sega_cases import LISTS, NUMBERS
from torch import Tensor

from dense_attn import ddim_step, layout_attention, percentile_mask, sega_guidance, tile_lists

DEVICE = DEVICES["triton"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(why_skip("triton") is not None, reason=str(why_skip("triton"))),
]
on_a_gpu = pytest.mark.skipif(
    INTERPRETED, reason="the interpreter has no graphs, streams, memory of its own or tf32"
)
GUIDANCE = {**{name: list(values[:2]) for name, values in LISTS.items()}, **NUMBERS}
CASE = Case("gpu", (1, 2, 80, 140, 40), words="runs", ordered=True)


def attention(q: Tensor, k: Tensor, v: Tensor, *words: Tensor, **options: object) -> Tensor:
    return layout_attention(q, k, v, *words, 0.6, backend="triton", **options)


def inputs(dtype: torch.dtype = torch.float16) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    there = moved(make_inputs(CASE, dtype), DEVICE)
    return (there.q, there.k, there.v, there.q_regions, there.k_regions), there.orders


def with_gradients(*tensors: Tensor) -> tuple[Tensor, ...]:
    """out, dq, dk, dv."""
    leaves = [x.detach().requires_grad_() for x in tensors[:3]]
    out = attention(*leaves, *tensors[3:])
    return out.detach(), *torch.autograd.grad(out.float().cos().sum(), leaves)


def guided(*tensors: Tensor) -> tuple[Tensor, ...]:
    x, eps = tensors
    return sega_guidance(
        x, eps, torch.stack([x - eps, x + eps]), x.float(), **GUIDANCE, backend="triton"
    )


def stepped(x: Tensor, eps: Tensor) -> tuple[Tensor, ...]:
    return ddim_step(x, eps, 0.5, 0.6, backend="triton"), *percentile_mask(x, 0.7, backend="triton")


def latents(size: int = 64) -> tuple[Tensor, Tensor]:
    return tuple(torch.randn(2, 1, 4, size, size, device=DEVICE))


def few_keys() -> tuple[Tensor, ...]:
    q, k, v, q_words, k_words = inputs()[0]
    return q, k[:, :, :77], v[:, :, :77], q_words, k_words[:77]


CALLS: dict[str, tuple[Callable, Callable]] = {
    "attention": (lambda *x: (attention(*x),), lambda: inputs()[0]),
    "attention of few keys": (lambda *x: (attention(*x),), few_keys),
    "gradients": (with_gradients, lambda: inputs()[0]),
    "guidance": (guided, latents),
    "guidance of long channels": (guided, lambda: latents(8 if INTERPRETED else 256)),
    "steps": (stepped, latents),
}


@on_a_gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_captured_graph_follows_its_inputs(name: str) -> None:
    call, make = CALLS[name]
    static = make()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(*static)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call(*static)
    before = [x.clone() for x in call(*static)]
    for x in static:
        if x.is_floating_point():
            x.copy_(x.flip(-2))
    graph.replay()
    assert not all(map(torch.equal, results, before))
    for got, expected in zip(results, call(*static), strict=True):
        assert torch.equal(got, expected)


@on_a_gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_call_never_waits_for_the_gpu(name: str) -> None:
    call, make = CALLS[name]
    tensors = make()
    call(*tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(*tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", CALLS)
def test_runs_are_equal(name: str) -> None:
    call, make = CALLS[name]
    tensors = make()
    first = call(*tensors)
    for _ in range(3):
        for got, expected in zip(call(*tensors), first, strict=True):
            assert torch.equal(got, expected)


@on_a_gpu
@pytest.mark.parametrize("name", CALLS)
def test_a_call_goes_to_the_current_stream(name: str) -> None:
    """Its inputs are written there, late; a call on another stream would not see them."""
    call, make = CALLS[name]
    tensors = make()
    expected = call(*tensors)
    late = [torch.zeros_like(x) for x in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for x, value in zip(late, tensors):
            x.copy_(value)
        results = call(*late)
    stream.synchronize()
    for got, right in zip(results, expected, strict=True):
        assert torch.equal(got, right)


@on_a_gpu
@pytest.mark.parametrize("name", ["attention", "gradients", "guidance", "steps"])
def test_inductor_takes_the_ops_whole(name: str) -> None:
    call, make = CALLS[name]
    tensors = make()
    for got, expected in zip(
        torch.compile(call, fullgraph=True)(*tensors), call(*tensors), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_orders_and_lists_change_nothing() -> None:
    tensors, orders = inputs(torch.float32)
    lists = tile_lists(tensors[0], tensors[1], *tensors[3:], **orders, backend="triton")
    assert lists is not None
    expected = attention(*tensors)
    torch.testing.assert_close(attention(*tensors, **orders), expected)
    assert torch.equal(
        attention(*tensors, **orders, tile_lists=lists), attention(*tensors, **orders)
    )


@on_a_gpu
def test_offsets_beyond_32_bits() -> None:
    """Two samples whose rows lie more than 2^31 elements apart."""
    apart = 2**31 + 64
    if torch.cuda.mem_get_info()[0] < 3 * 2 * apart + 2**30:
        pytest.skip("less than 14 GB of free GPU memory")
    (q, k, v, *words), _ = inputs()
    far = []
    for x in (q, k, v):
        memory = torch.empty(apart + x[0].numel(), dtype=x.dtype, device="cuda")
        view = memory.as_strided(x.shape, (apart, *x.stride()[1:]))
        far.append(view.copy_(x))
    assert torch.equal(attention(*far, *words), attention(q, k, v, *words))


@on_a_gpu
def test_tf32_is_torchs_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, _ = inputs(torch.float32)
    exact = layout_attention(
        *(x.double() for x in tensors[:3]), *tensors[3:], 0.6, backend="reference"
    )
    errors = []
    for precision in ("ieee", "tf32"):
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", precision)
        errors.append((attention(*tensors) - exact).abs().max().item())
    assert errors[0] < 1e-5
    assert 10 * errors[0] < errors[1] < 1e-2


@on_a_gpu
def test_autocast() -> None:
    tensors, _ = inputs(torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        out = attention(*tensors)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, attention(*(x.bfloat16() for x in tensors[:3]), *tensors[3:]))


@pytest.mark.parametrize("method", ["edict", "bdia"])
def test_a_chain_sampled_on_the_gpu_is_undone_on_the_cpu(method: str) -> None:
    """Its network runs on the CPU for both, so that eps is the same."""
    network, noise = Network(), torch.randn(1, 4, 6, 5)

    def eps_fn(x: Tensor, t: int) -> Tensor:
        return network(x.cpu(), t).to(x.device)

    with torch.no_grad():
        image = sampler(20, method=method, backend="triton").sample(eps_fn, noise.to(DEVICE))
        found = sampler(20, method=method, backend="cpu").invert(eps_fn, *(x.cpu() for x in image))
        there = sampler(20, method=method, backend="triton").invert(eps_fn, *image)
        again = sampler(20, method=method, backend="cpu").sample(eps_fn, *found)
    for got, expected in zip((*there, *image), (*found, *again), strict=True):
        assert torch.equal(got.cpu(), expected)


@on_a_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_call_runs_on_the_device_of_its_tensors() -> None:
    tensors, _ = inputs()
    there = [x.to("cuda:1") for x in tensors]
    out = attention(*there)
    assert out.device == torch.device("cuda:1")
    assert torch.equal(out.cpu(), attention(*tensors).cpu())
