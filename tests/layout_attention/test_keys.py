"""Key masks and grouped heads: a key that is not there leaves no trace, one that is added to is as
the formula has it, and heads share keys without a copy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from accuracy import assert_accurate, evaluate, exact_and_plain, same_bits
from cases import MODULATIONS, Case, Inputs, backends, make_inputs
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from dense_attn import layout_attention, reference, tile_lists
from dense_attn.layout_attention import keys
from dense_attn.reference.layout_attention import modulate

BACKENDS = pytest.mark.parametrize("backend", backends("reference", "cpu"))
RULES = pytest.mark.parametrize("modulation", MODULATIONS)
MASKED = Case("masked", (3, 4, 20, 33, 40), strength="full", keys="anywhere", group=2)
B, N = 3, 33


def attend(x: Inputs, backend: str, **options: object) -> dict[str, Tensor]:
    """Results and gradients of a call."""
    options = {"return_lse": True, "backend": backend, **options}
    return evaluate(partial(layout_attention, **options), x)


@RULES
@pytest.mark.parametrize("scale", [0.16, -0.16])
def test_the_reference_has_the_keys_that_are_there(modulation: str, scale: float) -> None:
    """Its rule for masks and groups against itself on each sample's own keys, one head a head;
    scores are all below 0 or all above.
    """
    x = make_inputs(replace(MASKED, values="low"), torch.float64)
    exact, _ = exact_and_plain(x, modulation=modulation, scale=scale)
    x.k[~x.k_mask[:, None].expand(3, 2, N)] = torch.nan  # whatever the others hold
    options = {"modulation": modulation, "scale": scale, "k_mask": x.k_mask}
    call = partial(reference.layout_attention, **options)
    for name, result in evaluate(call, x).items():
        torch.testing.assert_close(result, exact[name], rtol=1e-12, atol=1e-12)


@BACKENDS
def test_every_form_of_a_mask_is_the_same(backend: str) -> None:
    x = make_inputs(MASKED, torch.float32)
    there = x.k_mask
    expected = attend(x, backend, k_mask=there)
    zeros = torch.zeros(B, N)
    forms = [there[:, None, None], there[:, None, None].expand(B, 4, 20, N)]
    for gone in (-1e4, -torch.inf, torch.finfo(torch.float32).min):
        forms.append(zeros.masked_fill(~there, gone))
    forms.append(zeros.half().masked_fill(~there, -1e4)[:, None, None])
    for form in forms:
        for name, result in attend(x, backend, k_mask=form).items():
            same_bits(result, expected[name])


@BACKENDS
def test_counts_are_masks_of_the_first(backend: str) -> None:
    x, counts = make_inputs(MASKED, torch.float32), torch.tensor([0, 5, N], dtype=torch.int32)
    expected = attend(x, backend, k_mask=counts)
    for name, result in attend(x, backend, k_mask=torch.arange(N) < counts[:, None]).items():
        same_bits(result, expected[name])
    assert not expected["out"][0].any()
    assert expected["lse"][0].eq(-torch.inf).all()
    assert not any(expected[name][0].any() for name in ("dq", "dk", "dv", "dstrength"))


@BACKENDS
@RULES
@pytest.mark.parametrize("front", [False, True])
def test_what_is_not_there_is_not_looked_at(backend: str, modulation: str, front: bool) -> None:
    """No number of it matters, and it has no gradient; a sample without keys has none at all."""
    x = make_inputs(MASKED, torch.float32)
    there = torch.arange(N) < torch.tensor([[0], [5], [32]]) if front else x.k_mask.clone()
    there[0] = False
    clean = attend(x, backend, modulation=modulation, k_mask=there)
    gone = ~there[:, None].expand(x.k.shape[:3])
    for odd in (torch.nan, torch.inf, 1e30):
        x.k[gone], x.v[gone] = odd, odd
        for name, result in attend(x, backend, modulation=modulation, k_mask=there).items():
            same_bits(result, clean[name])
    assert not clean["dk"][gone].any()
    assert not clean["dv"][gone].any()
    assert all(not clean[name][0].any() for name in ("out", "dq", "dstrength"))


@BACKENDS
def test_a_mask_of_all_keys_changes_nothing(backend: str) -> None:
    x = make_inputs(MASKED, torch.float32)
    expected = attend(x, backend)
    for mask in (torch.ones(N, dtype=torch.bool), torch.zeros(B, 1, 1, N)):
        assert keys.of_mask(mask, x.q, x.k) == (None, None)
        for name, result in attend(x, backend, k_mask=mask).items():
            same_bits(result, expected[name])


def test_keys_in_front_stay_where_they_are() -> None:
    """Padding at the end, as prompts have it, moves no key."""
    x = make_inputs(MASKED, torch.float32)
    there, _ = keys.of_mask(torch.arange(N) < torch.tensor([[3], [N], [0]]), x.q, x.k)
    assert there.order is None
    assert there.first(x.k) is x.k
    assert there.counts.tolist() == [3, N, 0]
    there, _ = keys.of_mask(torch.arange(N) > 3, x.q, x.k)
    assert there.order.tolist() == [[*range(4, N), *range(4)]]


def to_be_added(head_dim: int, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """Inputs of two samples, and what their keys' scores get: 0 and 1, and up to some 60."""
    x = make_inputs(Case("added", (2, 4, 20, N, head_dim), strength="full", group=2), dtype)
    x.q_regions |= 16  # every row has keys in a region of its own
    x.k_regions[::3] |= 16
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(1, N, generator=generator, dtype=torch.float64) * 30
    return x, torch.cat((torch.arange(N)[None] % 2, numbers))


def added(x: Inputs, bias: Tensor, modulation: str, scale: float) -> Callable:
    """The formula, with numbers added to each key's scores before the rule."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        q_regions, k_regions, strength = rest
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = (q @ k.mT) * scale + bias.to(q.dtype)[:, None, None]
        matched = ((q_regions.unsqueeze(-1) & k_regions.unsqueeze(-2)) != 0).unsqueeze(-3)
        scores = modulate(scores, matched, strength, modulation)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    return attention


@BACKENDS
@RULES
@pytest.mark.parametrize("head_dim", [40, 41])
def test_numbers_are_added_to_scores(backend: str, modulation: str, head_dim: int) -> None:
    """A mask of ones and zeros adds them, though it should have removed keys."""
    x, bias = to_be_added(head_dim, torch.float64)
    exact = evaluate(added(x, bias, modulation, -0.3), x)
    results = attend(x, backend, modulation=modulation, scale=-0.3, k_mask=bias)
    assert results["out"].stride() == x.q.stride()
    for name, result in results.items():
        torch.testing.assert_close(result, exact[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", backends("cpu"))
@RULES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_are_added_in_full(backend: str, modulation: str, dtype: torch.dtype) -> None:
    """In narrow dtypes too, which have no room for both digits and size."""
    x, bias = to_be_added(40, dtype)
    call = added(x, bias, modulation, -0.3)
    exact, plain = evaluate(call, x, dtype=torch.float64), evaluate(call, x)
    results = attend(x, backend, modulation=modulation, scale=-0.3, k_mask=bias)
    for name, result in results.items():
        assert_accurate(name, result, exact[name], plain[name], dtype)


@pytest.mark.parametrize("backend", backends("cpu"))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1e-4, -1e-4, 30.0])
def test_numbers_are_added_whatever_the_scale(
    backend: str, dtype: torch.dtype, scale: float
) -> None:
    """A small one makes of them what float16 does not hold."""
    x, bias = to_be_added(16, dtype)
    x.q *= min(1, 0.1 / abs(scale))
    bias = bias * 20
    call = added(x, bias, "range", scale)
    exact, plain = evaluate(call, x, dtype=torch.float64), evaluate(call, x)
    out = attend(x, backend, scale=scale, k_mask=bias)["out"]
    assert_accurate("out", out, exact["out"], plain["out"], dtype)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 2e-5), (torch.float32, -5e-324)])
def test_too_small_a_scale_is_refused(dtype: torch.dtype, scale: float) -> None:
    """No column of q is large enough to hold what is added by one."""
    x, bias = to_be_added(16, dtype)
    tensors = x.q, x.k, x.v, x.q_regions, x.k_regions
    rule = r"^scale must be (6.1e-05|1.6e-30) or more in size .* got -?(2e-05|5e-324)$"
    with pytest.raises(ValueError, match=rule):
        layout_attention(*tensors, scale=scale, k_mask=bias)


@BACKENDS
def test_what_is_added_has_a_gradient(backend: str) -> None:
    x = make_inputs(Case("added", (2, 4, 20, 33, 40), strength="full", group=2), torch.float64)
    bias = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    tensors = x.q, x.k, x.v, x.q_regions, x.k_regions, x.strength
    expected = added(x, bias, "range", 0.2)(*tensors)
    got = layout_attention(*tensors, scale=0.2, k_mask=bias, return_lse=True, backend=backend)
    flows = x.grad_out, x.grad_lse
    grads = [torch.autograd.grad(results, bias, flows)[0] for results in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-9)
    assert grads[0].abs().sum() > 1


@BACKENDS
def test_numbers_are_added_to_what_is_left(backend: str) -> None:
    """A mask that removes some keys and adds to the others."""
    x = make_inputs(Case("both", (2, 2, 9, N, 16), group=2), torch.float64)
    bias = torch.randn(N, dtype=torch.float64)
    bias[5:9] = -torch.inf
    left = torch.cat((torch.arange(5), torch.arange(9, N)))
    options = {"scale": 0.2, "return_lse": True, "backend": backend}
    rest = x.q_regions, x.k_regions[left], x.strength
    tensors = x.q, x.k[:, :, left], x.v[:, :, left], *rest
    expected = layout_attention(*tensors, **options, k_mask=bias[left])
    tensors = x.q, x.k, x.v, x.q_regions, x.k_regions, x.strength
    for a, b in zip(layout_attention(*tensors, **options, k_mask=bias), expected):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@BACKENDS
@pytest.mark.parametrize("samples", [1, 3])
def test_an_order_of_all_keys_changes_nothing(backend: str, samples: int) -> None:
    x = make_inputs(MASKED, torch.float32)
    orders = torch.stack([torch.randperm(N) for _ in range(samples)]).int()
    expected = attend(x, backend, k_mask=x.k_mask)
    for order in (orders, orders[0], False):
        for name, result in attend(x, backend, k_mask=x.k_mask, k_order=order).items():
            same_bits(result, expected[name])
    there, _ = keys.of_mask(x.k_mask, x.q, x.k)
    for i, places in enumerate(there.visits(orders)):
        tokens = there.order[i][places.long()]
        in_turn = [int(j) for j in orders[i % samples] if x.k_mask[i, j]]
        assert tokens[: len(in_turn)].tolist() == in_turn
        assert sorted(places.tolist()) == list(range(N))


@pytest.mark.costly
@BACKENDS
def test_a_mask_compiles_in_one_graph(backend: str) -> None:
    """And another mask of the same sizes compiles nothing anew."""
    x = make_inputs(MASKED, torch.float32)
    tensors = x.q, x.k, x.v, x.q_regions, x.k_regions, x.strength
    for kind in (lambda m: m, lambda m: torch.where(m, 0.5, -1e4), lambda m: m.sum(-1).int()):

        def call(mask: Tensor, k: Tensor) -> Tensor:
            return layout_attention(x.q, k, *tensors[2:], k_mask=mask, backend=backend)

        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(call, fullgraph=True, backend=counter)
        for mask in (x.k_mask, ~x.k_mask, x.k_mask.roll(1)):
            results = []
            for function in (compiled, call):
                k = x.k.clone().requires_grad_()
                out = function(kind(mask), k)
                results.append((out, *torch.autograd.grad(out.square().sum(), k)))
            for got, expected in zip(*results):
                torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
        assert counter.frame_count == 1


@BACKENDS
def test_heads_share_keys(backend: str) -> None:
    """The bits of a call on a copy for every head; gradients are its sums, whatever the strides."""
    case = Case("groups", (2, 6, 50, 70, 40), strength="full", view="transposed", group=3)
    x = make_inputs(case, torch.float32)
    expected = attend(
        Inputs(x.q, *(y.repeat_interleave(3, 1) for y in (x.k, x.v)), *list(vars(x).values())[3:]),
        backend,
    )
    results = attend(x, backend)
    for name in ("out", "lse", "dq", "dstrength"):
        same_bits(results[name], expected[name])
    for name in ("dk", "dv"):
        summed = expected[name].double().unflatten(1, (2, 3)).sum(2).float()
        torch.testing.assert_close(results[name], summed, rtol=1e-5, atol=1e-5)
        same_bits(attend(x, backend)[name], results[name])


@BACKENDS
def test_lists_of_a_mask_are_of_its_keys(backend: str) -> None:
    """Backends without lists make none, masked or not."""
    x = make_inputs(MASKED, torch.float32)
    words = x.q_regions, x.k_regions
    assert tile_lists(x.q, x.k, *words, k_mask=x.k_mask, backend=backend) is None


@pytest.mark.parametrize("backend", backends("cpu"))
def test_the_widest_heads_that_are_added_to(backend: str) -> None:
    """The refusal of wider ones names the mask."""
    words, mask = torch.ones(N, dtype=torch.int32), torch.randn(N)
    q = torch.randn(1, 1, N, 254)
    layout_attention(q, q, q, words, words, k_mask=mask, backend=backend)
    q = torch.randn(1, 1, N, 256)
    reason = r"head_dim is at most 256, got 264 \(256 and 8 for k_mask\)$"
    with pytest.raises(RuntimeError, match=reason):
        layout_attention(q, q, q, words, words, k_mask=mask, backend=backend)
    with pytest.raises(RuntimeError, match=reason):
        tile_lists(q, q, words, words, k_mask=mask, backend=backend)
