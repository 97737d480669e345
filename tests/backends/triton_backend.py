"""The Triton backend behind the public ops, on a GPU or interpreted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import raw
import torch
from accuracy import assert_accurate, evaluate, exact_and_plain
from cases import DEVICES, INTERPRETED, Case, make_inputs, moved, why_skip
from chains import Network, sampler
from sega_cases import LISTS, NUMBERS, raw_options
from torch import Tensor
from torch.overrides import BaseTorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dense_attn import ddim_step, layout_attention, percentile_mask, sega_guidance, tile_lists
from dense_attn._backends import ops, raw_checks, table, triton
from dense_attn.benchmarks.host_cost.stubbed import launches_left_out
from dense_attn.triton_kernels import configs

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:(invalid value|overflow) encountered:RuntimeWarning"
    ),  # numpy's own
]
DEVICE = DEVICES["triton"]
GUIDANCE = {**{name: list(values[:2]) for name, values in LISTS.items()}, **NUMBERS}
ATTENTION = Case("public", (1, 2, 20, 150, 16), words="runs", ordered=True)


@pytest.mark.skipif(not INTERPRETED, reason="says what the interpreter can do")
def test_the_table() -> None:
    assert set(table.backends()["triton"].values()) == {"available"}
    x = torch.zeros(1, 1, 2, 257)
    assert table.why_not("triton", "layout_attention", x.double()) == [
        "head_dim is at most 256, got 257",
        "has no float64 kernels",
    ]
    bfloat16 = ["computes bfloat16 wrongly in Triton's interpreter"]
    assert table.why_not("triton", "ddim_step", x.bfloat16()) == bfloat16
    assert table.why_not("triton", "sega_guidance", x.double()) == ["has no float64 kernels"]
    assert table.why_not("triton", "ddim_step", x.double()) == []
    assert table.why_not("triton", "ddim_step", x.to("meta")) == ["runs on cpu tensors, got meta"]
    assert table.resolve("auto", "percentile_mask", x) == "triton"
    assert (
        table.resolve("auto", "percentile_mask", x.double()) == "cpu"
        if why_skip("cpu") is None
        else "reference"
    )
    with pytest.raises(
        RuntimeError,
        match="backend must be able to run percentile_mask, got 'triton': has no float64",
    ):
        percentile_mask(x.double(), 0.5, backend="triton")


@pytest.mark.parametrize("modulation", ["range", "mask"])
def test_layout_attention(modulation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both orders reach both ops."""
    orders = []
    for name in ("layout_attention_fwd", "layout_attention_bwd"):
        launch = getattr(triton, name)

        def spying(*arguments: object, launch: Callable = launch, q_at: int) -> object:
            orders.append(arguments[q_at : q_at + 2])
            return launch(*arguments)

        monkeypatch.setattr(triton, name, partial(spying, q_at=8 if "fwd" in name else 12))
    monkeypatch.setattr(triton, "EAGER", {})
    inputs = make_inputs(ATTENTION, torch.float32)
    exact, plain = exact_and_plain(inputs, modulation=modulation)
    there = moved(inputs, DEVICE)
    call = partial(
        layout_attention, modulation=modulation, return_lse=True, backend="triton", **there.orders
    )
    for name, result in evaluate(call, there).items():
        assert_accurate(name, result.cpu(), exact[name], plain[name], torch.float32)
    assert len(orders) == 2
    for q_order, k_order in orders:
        assert torch.equal(q_order.cpu(), inputs.orders["q_order"])
        assert torch.equal(k_order.cpu(), inputs.orders["k_order"])


class Ops(TorchDispatchMode):
    """The names of the ops that torch meanwhile dispatches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


class Words(Tensor):
    """Words of another kind than torch's."""


def test_torch_is_passed_by_where_nothing_watches_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher is called then, with the same result; else the op is seen."""
    op, called = "dense_attn_triton::layout_attention_fwd", []
    at_once = triton.EAGER["layout_attention_fwd"]
    noting = lambda *given: called.append(1) or at_once(*given)  # noqa: E731
    monkeypatch.setitem(triton.EAGER, "layout_attention_fwd", noting)
    there = moved(make_inputs(ATTENTION, torch.float32), DEVICE)
    tensors = there.q, there.k, there.v, there.q_regions, there.k_regions, there.strength

    def call(*tensors: Tensor) -> Tensor:
        return layout_attention(*tensors, backend="triton", **there.orders)

    bare = call(*tensors)
    assert called == [1]
    with Ops() as seen:
        watched = call(*tensors)
    assert seen.names.count(op) == 1
    assert torch.equal(bare, watched)
    with profile(activities=[ProfilerActivity.CPU]) as told:
        call(*tensors)
    assert op in {event.name for event in told.events()}
    traced = torch.jit.trace(call, tensors, check_trace=False)
    assert op in str(traced.inlined_graph)
    assert torch.equal(traced(*tensors), bare)
    with BaseTorchFunctionMode():
        call(*tensors)
    call(*tensors[:3], tensors[3].as_subclass(Words), *tensors[4:])
    assert called == [1]
    if INTERPRETED:  # a look at values waits for a GPU
        wrong = {"q_order": torch.zeros_like(there.orders["q_order"])}
        with pytest.raises(RuntimeError, match="q_order must be a permutation of the tokens"):
            layout_attention(*tensors, backend="triton", **wrong)


def compare(call: Callable, *tensors: Tensor) -> None:
    """Results and gradients of a call against the reference's, to float32's last digits."""
    leaves = [x.detach().to(DEVICE).requires_grad_() for x in tensors]
    found = []
    for backend in ("triton", "reference"):
        results = call(*leaves, backend=backend)
        results = (results,) if isinstance(results, Tensor) else results
        loss = sum(
            (x * torch.arange(x.numel(), device=DEVICE).view(x.shape).cos()).sum()
            for x in results
            if x.requires_grad
        )
        found.append([*results, *torch.autograd.grad(loss, leaves)])
    for got, expected in zip(*found):
        torch.testing.assert_close(got, expected)


def sega_tensors() -> tuple[Tensor, ...]:
    return (
        *torch.randn(2, 1, 2, 5, 7).unbind(0),
        torch.randn(2, 1, 2, 5, 7),
        torch.randn(1, 2, 5, 7),
    )


def test_percentile_mask() -> None:
    compare(partial(percentile_mask, level=0.7, dim=(1, 2)), torch.randn(2, 5, 7))


@pytest.mark.parametrize("sum_channels", [False, True])
def test_sega_guidance(sum_channels: bool) -> None:
    compare(partial(sega_guidance, **GUIDANCE, sum_channels=sum_channels), *sega_tensors())


def test_ddim_step() -> None:
    x, eps, uncond = torch.randn(3, 2, 3, 5).unbind(0)

    def step(x: Tensor, eps: Tensor, uncond: Tensor, backend: str) -> Tensor:
        return ddim_step(x, eps, 0.5, 0.6, eps_uncond=uncond, guidance_scale=7.5, backend=backend)

    compare(step, x, eps, uncond)
    compare(step, x.mT.contiguous().mT, eps, uncond)  # other strides than those of eps


@pytest.mark.parametrize(
    "options",
    [
        {"method": "edict"},
        {"method": "bdia"},
        {"method": "edict", "exact": False},
        {"method": "ddim"},
    ],
    ids=str,
)
def test_reversible_sampler(options: dict[str, object]) -> None:
    """The reference's bits there and back, and the gradients of the whole chain."""
    noise, network, found = torch.randn(1, 4, 3, 5).to(DEVICE), Network().to(DEVICE), []
    for backend in ("triton", "reference"):
        chain, x = sampler(3, backend=backend, **options), noise.clone().requires_grad_()
        image = chain.sample(network, x)
        grads = torch.autograd.grad(
            image[0].square().sum() + image[1].sum(), [x, *network.parameters()]
        )
        back = (
            ()
            if options["method"] == "ddim"
            else chain.invert(network, *(z.detach() for z in image))
        )
        found.append(([*image, *back], grads))
    (results, grads), (expected, expected_grads) = found
    for got, right in zip(results, expected, strict=True):
        torch.testing.assert_close(got, right, rtol=0, atol=0)
    for got, right in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(got, right)


def test_what_left_the_grid_is_seen_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def huge(x: Tensor, t: int) -> Tensor:
        return x * (9e6 if t < 500 else 1)

    chain, x = sampler(3, backend="triton"), torch.ones(1, 1, 2, 2, device=DEVICE)
    rule = (
        r"eps_fn's result must be finite and keep the latents within the grid of 2\^50 steps, got "
    )
    if INTERPRETED:
        with pytest.raises(RuntimeError, match=rule + r"3.8\S+ grid steps at step 1"):
            chain.sample(huge, x)
    monkeypatch.setattr(raw_checks.reversible, "on_the_grid", lambda *_: None)  # as on a GPU
    with pytest.raises(RuntimeError, match=rule + "latents that left it on the way"):
        chain.sample(huge, x)


def test_torch_compile_has_no_graph_breaks() -> None:
    inputs = moved(make_inputs(ATTENTION, torch.float32), DEVICE)

    def attention(*tensors: Tensor) -> tuple:
        return layout_attention(*tensors, return_lse=True, backend="triton", **inputs.orders)

    compiled = evaluate(torch.compile(attention, fullgraph=True, backend="aot_eager"), inputs)
    for name, result in evaluate(attention, inputs).items():
        assert torch.equal(result, compiled[name]), name

    def steps(x: Tensor, eps: Tensor) -> tuple:
        masked, threshold = percentile_mask(
            ddim_step(x, eps, 0.5, 0.6, backend="triton"), 0.7, backend="triton"
        )
        return (
            masked,
            threshold,
            *sega_guidance(x, eps, torch.stack([x, -eps]), x, **GUIDANCE, backend="triton"),
        )

    x, eps = torch.randn(2, 1, 2, 5, 7, device=DEVICE)
    for got, expected in zip(
        torch.compile(steps, fullgraph=True, backend="aot_eager")(x, eps), steps(x, eps)
    ):
        assert torch.equal(got, expected)


@pytest.mark.skipif(not INTERPRETED, reason="what the host does is the same for every device")
@pytest.mark.parametrize("lse", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("parks", [False, True])
@pytest.mark.parametrize("strength", [0.3, None], ids=["number", "tensor"])
def test_a_call_with_lists_launches_one_kernel_and_makes_its_results(
    lse: bool, grad: bool, parks: bool, strength: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "INTERPRETED", replace(configs.INTERPRETED, parks=parks))
    x = make_inputs(ATTENTION, torch.float32)
    q, words = x.q.requires_grad_(grad), (x.q_regions, x.k_regions)
    lists = tile_lists(q, x.k, *words, backend="triton")
    how = {"return_lse": lse, "tile_lists": lists, "backend": "triton"}
    with (
        launches_left_out() as launched,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        layout_attention(q, x.k, x.v, *words, x.strength if strength is None else strength, **how)
    assert launched == ["layout_attention_fwd_kernel"]
    found = [event for event in seen.events() if event.name.startswith("aten::")]
    views = {"aten::expand", "aten::as_strided", "aten::view", "aten::detach"}
    makers = {"aten::new_empty", "aten::new_empty_strided"}
    assert {event.name for event in found if "aten::empty" not in event.name} - views <= makers
    made = [event.self_cpu_memory_usage for event in found if event.self_cpu_memory_usage > 0]
    row = q[..., 0].numel()
    numbers = [q.numel(), *[row] * lse, *[4 * row] * grad, *[q.numel()] * parks]
    assert sorted(made) == sorted(4 * size for size in numbers)


def raw_calls() -> dict[str, tuple[tuple, dict]]:
    """Arguments of every op but layout attention's, which triton_attention.py checks."""
    x, y, eps = torch.randn(3, 2, 7)
    z, w = (torch.randint(-(2**40), 2**40, (2, 7)) for _ in range(2))
    narrow = torch.float16
    calls = {
        "percentile_mask": (x, 0.7),
        "ddim_step": (x, eps, y, 0.9, 0.3, 7.5),
        "leapfrog_step": (x, y, eps, 0.9, 0.3, 0.1),
        "exact_couple": (z, eps, 1e6, 1e-6, narrow),
        "exact_leapfrog": (z, w, eps, 0.9, 1e6, 1e-6, narrow),
    }
    calls |= dict.fromkeys(("edict_mix", "edict_unmix"), (x, y, eps, 0.9, 0.3, 0.93, True))
    calls |= dict.fromkeys(
        ("exact_mix", "exact_unmix"), (z, w, None, 0.0, 0.93, True, 1e-6, False, narrow)
    )
    named = {**raw_options(GUIDANCE), "user_mask": None, "sum_channels": False}
    return {name: (arguments, {}) for name, arguments in calls.items()} | {
        "sega_guidance": (sega_tensors(), named)
    }


def test_every_op_has_a_raw_call() -> None:
    assert raw_calls().keys() == ops.OPS.keys() - {raw.FWD, raw.BWD, "tile_lists"}


@pytest.mark.parametrize("name", raw_calls())
def test_opcheck(name: str) -> None:
    arguments, named = raw_calls()[name]
    arguments = [x.to(DEVICE) if isinstance(x, Tensor) else x for x in arguments]
    torch.library.opcheck(getattr(triton, name), arguments, named)


@pytest.mark.parametrize("name", raw_calls())
def test_a_raw_call_refuses_a_meta_tensor(name: str) -> None:
    """Its fake kernel runs then, and would hand back tensors without values."""
    (first, second, *others), named = raw_calls()[name]
    if isinstance(second, Tensor):
        with pytest.raises(RuntimeError, match=r"must be on \w+ like the first tensor, got"):
            getattr(triton, name)(first, second.to("meta"), *others, **named)
