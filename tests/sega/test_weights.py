"""Weights of concepts: the rule of the public op, and kernels that take any weights."""

from __future__ import annotations

import pytest
import raw
import torch
from accuracy import same_bits
from cases import backends, why_skip
from sega_cases import NUMBERS

from dense_attn import reference, sega_guidance
from dense_attn._backends import table

T, F = True, False
RULES = {  # edit_weights, warm, enabled; weights, partials, whether all are warm
    "all warm": (([1.0, 2.0], [T, T], [T, T]), ([1.0, 2.0], [0.0, 0.0], T)),
    "negative": (([1.0, -2.0], [T, T], [T, T]), ([1.0, 0.0], [0.0, 0.0], T)),
    "over": (([1.0, 2.0], [T, T], [T, F]), ([1.0, 0.0], [0.0, 0.0], T)),
    "some warm": (([1.0, 3.0, 4.0], [T, T, F], [T, T, T]), ([1.0, 3.0, 4.0], [0.25, 0.75, 0.0], F)),
    "some over": (([1.0, 3.0, 4.0], [T, T, F], [F, T, T]), ([0.0, 3.0, 4.0], [0.0, 1.0, 0.0], F)),
    "warm without weight": (([-1.0, 2.0], [T, F], [T, T]), ([0.0, 2.0], [0.0, 0.0], F)),
    "none warm": (([1.0, 2.0], [F, F], [T, T]), ([1.0, 2.0], [0.0, 0.0], F)),
    "no concepts": (([], [], []), ([], [], T)),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_the_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stands once: what kernels are handed are these numbers."""
    (edit_weights, warm, enabled), expected = RULES[name]
    assert reference.sega_weights(edit_weights, warm, enabled) == expected
    backend = table.NAMESPACES["reference"]
    handed, kernel = [], backend.sega_guidance

    def seen(*tensors: torch.Tensor, **options: object) -> tuple:
        handed.append(tuple(options[name] for name in ("weights", "partials", "all_warm")))
        return kernel(*tensors, **options)

    monkeypatch.setattr(backend, "sega_guidance", seen)
    eps = torch.randn(2 + len(warm), 1, 2, 5)
    rules = {"edit_weights": edit_weights, "warm": warm, "enabled": enabled, "reverse": False}
    options = {"edit_guidance_scale": 5.0, "edit_threshold": 0.5, **rules, **NUMBERS}
    sega_guidance(eps[0], eps[1], eps[2:], None, **options, backend="reference")
    assert handed == [expected]


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
@pytest.mark.parametrize("all_warm", [True, False])
@pytest.mark.parametrize("sum_channels", [True, False])
def test_kernels_take_any_weights(all_warm: bool, sum_channels: bool) -> None:
    """Each of the two alone too, and negative ones; what has neither adds no NaN of infinity."""
    eps = torch.randn(6, 2, 3, 40)
    eps[5, 0, 0, 7] = torch.inf
    options = {
        **NUMBERS,
        "edit_guidance_scale": [5.0, 3.0, 4.0, 2.0],
        "edit_threshold": [0.9, 0.5, 0.0, 0.7],
        "weights": [1.0, 0.0, -2.0, 0.0],
        "partials": [0.0, 0.5, 0.25, 0.0],
        "all_warm": all_warm,
        "reverse": [False, True, False, False],
        "sum_channels": sum_channels,
        "user_mask": None,
    }
    tensors = {"eps_uncond": eps[0], "eps_text": eps[1], "eps_edits": eps[2:], "momentum": eps[0]}
    got = raw.call("sega_guidance", tensors | options)
    expected = reference.sega_guidance(*tensors.values(), **options)
    assert got[0].isfinite().all()
    for result, right in zip(got[:2], expected):
        torch.testing.assert_close(result, right, rtol=1e-6, atol=1e-5)
    same_bits(got[2], expected[2])


@pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))
@pytest.mark.parametrize("rules", ["cold", "over", "none"])
def test_what_has_no_weight_has_a_gradient_of_zero(rules: str, backend: str) -> None:
    """Warm-up steps are such, after which a loop's gradients go on."""
    concepts = 0 if rules == "none" else 2
    eps = torch.randn(2 + concepts, 1, 2, 5)
    momentum = torch.randn(1, 2, 5)
    leaves = [x.requires_grad_() for x in (eps[0].clone(), eps[1].clone(), eps[2:].clone())]
    momentum.requires_grad_()
    options = {"edit_guidance_scale": 5.0, "edit_threshold": 0.5, "edit_weights": 1.0}
    options |= {"warm": rules != "cold", "enabled": rules != "over", "reverse": False, **NUMBERS}
    out, after = sega_guidance(*leaves, momentum, **options, backend=backend)
    for result in (out,) if rules == "cold" else (out, after):
        grads = torch.autograd.grad(result.sum(), [*leaves, momentum], retain_graph=True)
        assert grads[2].count_nonzero() == 0
