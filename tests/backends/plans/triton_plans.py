"""Plans of Triton's raw calls: found once for a form, and of no use to what the checks refuse."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dense_attn._backends import raw_checks, triton
from dense_attn.triton_kernels import autotune, configs

B, H, M, N, D = 2, 2, 20, 150, 16
OPS = ("layout_attention_fwd", "layout_attention_bwd")
INTERPRETED = triton.interpreted()
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="checks are the same on every device")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The checks of inputs that are made meanwhile."""
    found, check = [], raw_checks.layout_attention._inputs
    noted = lambda *given: (found.append(1), check(*given))[1]  # noqa: E731
    monkeypatch.setattr(raw_checks.layout_attention, "_inputs", noted)
    return found


def given(op: str) -> dict[str, object]:
    """Arguments of a raw call by their names."""
    q, grad, out = torch.randn(3, B, H, M, D).unbind(0)
    k, v = torch.randn(2, B, H, N, D).unbind(0)
    words = torch.arange(N, dtype=torch.int32) % 3
    tokens = {"q": q, "k": k, "v": v, "q_regions": words[:M], "k_regions": words}
    tokens["strength"] = torch.rand(B, H, M)
    orders = {"q_order": torch.arange(M).flip(0).int(), "k_order": None}
    last = {"every_strength": 1.0}
    if op == "layout_attention_bwd":
        grads = {"grad_out": grad, "grad_lse": None}
        saved = {"out": out, "stats": torch.zeros(B, H, M, 4)}
        rule = {"modulation": "bias", "scale": 0.25}
        return {**grads, **tokens, **saved, **rule, **orders, **last, "seqlens_k": None}
    lists = triton.tile_lists_for(q, k, words[:M], words, orders["q_order"], False, kept=False)
    visits = dict(zip(("tiles", "counts", "k_words"), lists[:3]))
    asked = {"with_lse": True, "with_stats": True, "seqlens_k": None}
    return {**tokens, "modulation": "bias", "scale": 0.25, **orders, **visits, **last, **asked}


def run(op: str, arguments: dict[str, object]) -> tuple[Tensor, ...]:
    return getattr(triton, op)(*arguments.values())


@pytest.mark.parametrize("op", OPS)
def test_a_form_is_checked_once_and_gives_the_same_bits(op: str, checked: list[int]) -> None:
    call = given(op)
    first, again = run(op, call), run(op, call)
    assert len(checked) == 1
    assert all(map(torch.equal, first, again))
    other = call | {"q": call["q"] + 1, "scale": 0.5, "every_strength": 0.1}
    assert not torch.equal(run(op, other)[0], first[0])
    assert len(checked) == 1


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "change",
    [
        lambda x: {"q": x["q"].transpose(1, 2).contiguous().transpose(1, 2)},
        lambda x: {"strength": None},
        lambda x: {"k_regions": x["k_regions"].expand(B, N)},
        lambda x: {"q_order": None},
        lambda x: {"scale": -0.25},
        lambda x: {"modulation": "max"},
        lambda x: {"seqlens_k": torch.tensor([N, 3], dtype=torch.int32)},
    ],
    ids=["strides", "strength", "words", "order", "sign", "modulation", "counts"],
)
def test_another_form_has_its_own(op: str, change: Callable, checked: list[int]) -> None:
    """With the bits of a call that finds no plan."""
    call = given(op)
    run(op, call)
    other = call | change(call)
    if op == "layout_attention_fwd":
        other |= dict.fromkeys(("tiles", "counts", "k_words"))
    planned = run(op, other)
    assert len(checked) == 2
    triton.plans.forget()
    assert all(map(torch.equal, planned, run(op, other)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda x: {"k": x["k"].double()}, "k must "),
        (lambda x: {"v": x["v"].mT.contiguous().mT}, "v must have a contiguous last dimension"),
        (lambda x: {"q_regions": x["q_regions"].long()}, "q_regions must be int32"),
        (lambda x: {"k_regions": x["k_regions"][1:]}, "k_regions must have shape"),
        (lambda x: {"strength": x["strength"][:1]}, "strength must have shape"),
        (lambda x: {"scale": float("nan")}, "scale must be finite"),
        (lambda x: {"every_strength": 1e39}, "every_strength must be finite in float32"),
        (lambda x: {"q_order": torch.zeros_like(x["q_order"])}, "q_order must be a permutation"),
    ],
    ids=["dtype", "strides", "words", "tokens", "strength", "scale", "every", "order"],
)
def test_what_is_wrong_is_refused_after_what_is_right(op: str, change: Callable, rule: str) -> None:
    call = given(op)
    run(op, call)
    with pytest.raises(RuntimeError, match=rule):
        run(op, call | change(call))


@pytest.mark.parametrize("op", OPS)
def test_counts_are_looked_at_in_each_call(op: str) -> None:
    call = given(op) | {"seqlens_k": torch.tensor([N, 3], dtype=torch.int32)}
    if op == "layout_attention_fwd":
        call |= dict.fromkeys(("tiles", "counts", "k_words"))
    run(op, call)
    call["seqlens_k"][0] = N + 1
    with pytest.raises(RuntimeError, match=f"seqlens_k must count 0 to {N} keys"):
        run(op, call)


def test_lists_of_other_shapes_are_refused_after_those_that_fit() -> None:
    call = given(OPS[0])
    run(OPS[0], call)
    with pytest.raises(RuntimeError, match="tile_lists must have contiguous tensors of shape"):
        run(OPS[0], call | {"tiles": call["tiles"][:, 1:]})
    with pytest.raises(RuntimeError, match="tile_lists must be 3 tensors, got 2"):
        run(OPS[0], call | {"counts": None})


@pytest.mark.parametrize("op", OPS)
def test_products_of_another_precision_have_another_plan(
    op: str, monkeypatch: pytest.MonkeyPatch, checked: list[int]
) -> None:
    call = given(op)
    run(op, call)
    precision = configs.precision
    monkeypatch.setattr(configs, "precision", lambda q: "tf32" if q.is_floating_point() else "")
    run(op, call)
    assert len(checked) == 2
    monkeypatch.setattr(configs, "precision", precision)
    run(op, call)
    assert len(checked) == 2


@pytest.mark.parametrize("op", OPS)
def test_measured_configurations_are_asked_for_each_time(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of a form whose plan is there, which has what the tables say."""
    call, asked = given(op), []
    run(op, call)
    monkeypatch.setenv("DENSE_ATTN_AUTOTUNE", "1")
    best = lambda kernel, q, k, options, *_: (asked.append(kernel), options[0])[1]  # noqa: E731
    monkeypatch.setattr(autotune, "best", best)
    run(op, call)
    first = len(asked)
    assert first > 0
    run(op, call)
    assert len(asked) == 2 * first
