"""Semantic guidance: accuracy on every backend, and the properties of its definition."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accuracy import assert_accurate, same_bits
from cases import backends
from hypothesis import given, settings
from hypothesis import strategies as st
from sega_cases import (
    CASES,
    LISTS,
    NUMBERS,
    Case,
    evaluate,
    exact_and_plain,
    kept_entries,
    make_inputs,
    raw_options,
)
from torch import Tensor

from dense_attn import SemanticGuidance, _checks, reference, sega_guidance
from dense_attn._backends import table
from dense_attn.verify.accuracy import judge

pytestmark = pytest.mark.usefixtures("poisoned_memory")
every_backend = pytest.mark.parametrize("backend", backends("reference", "cpu", op="sega_guidance"))
properties = settings(max_examples=30, deadline=None, derandomize=True, database=None)
CALLS = [
    pytest.param(case, dtype, id=f"{case.name}-{_checks.name(dtype)}")
    for case in CASES
    for dtype in case.dtypes
]
CASE = CASES[0]


@every_backend
@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_accuracy(backend: str, case: Case, dtype: torch.dtype) -> None:
    inputs, options = make_inputs(case, dtype), case.options()
    exact, plain = exact_and_plain(inputs, options)

    def step(*tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        return sega_guidance(*tensors[:4], user_mask=tensors[4], **options, backend=backend)

    results = evaluate(step, inputs)
    assert results.keys() == exact.keys()
    for name, result in results.items():
        assert_accurate(name, result, exact[name], plain[name], dtype)
    with torch.no_grad():  # another way through the code
        eps, momentum = step(
            inputs.eps_uncond, inputs.eps_text, inputs.eps_edits, inputs.momentum, inputs.user_mask
        )
    assert eps.dtype == dtype
    same_bits(eps, results["eps"])
    same_bits(momentum, results["momentum"])


@every_backend
@pytest.mark.parametrize(("case", "dtype"), CALLS)
def test_thresholds_are_their_definition(backend: str, case: Case, dtype: torch.dtype) -> None:
    """Bit for bit; so that an entry on its threshold stays on every backend, or on none."""
    inputs, options = make_inputs(case, dtype), case.options()
    count, batch, channels = case.size[:3]
    uncond, text = (
        x.reshape(batch, channels, -1 if x.numel() else 1)
        for x in (inputs.eps_uncond, inputs.eps_text)
    )
    lists = {
        name: options[name] if isinstance(options[name], list) else [options[name]] * count
        for name in LISTS
    }
    momentum = uncond.to(reference.accumulation_dtype(dtype))
    *_, thresholds = table.NAMESPACES[backend].sega_guidance(
        uncond,
        text,
        inputs.eps_edits.reshape(count, *uncond.shape),
        momentum,
        **raw_options({**NUMBERS, **lists}),
        user_mask=None,
        sum_channels=options.get("sum_channels", False),
    )
    same_bits(thresholds, kept_entries(inputs, options)[1])


@pytest.mark.parametrize(
    "change", [*NUMBERS, "edit_guidance_scale", "edit_threshold", "edit_weights", "reverse"]
)
def test_the_rule_of_accuracy_can_fail(change: str) -> None:
    inputs, options = make_inputs(CASE, torch.float32), CASE.options()
    exact, plain = exact_and_plain(inputs, options)
    wrong = {
        **dict.fromkeys(NUMBERS, 0.40001),
        "edit_guidance_scale": [5.0, -3.0, 0.7001],
        "edit_threshold": [0.9, 0.37, 0.9499],
        "edit_weights": [1.0, 2.0, 0.50001],
        "reverse": [False, True, True],
    }
    options[change] = 7.5001 if change == "guidance_scale" else wrong[change]
    options["edit_mom_beta"] = 0.40001 if change == "edit_mom_beta" else 0.4
    step = partial(sega_guidance, **{**options, "backend": "reference"})
    results = evaluate(lambda *tensors: step(*tensors[:4]), inputs)
    verdicts = {
        name: judge(result, exact[name], plain[name], torch.float32)
        for name, result in results.items()
    }
    assert any(error > allowed for error, allowed in verdicts.values())


Estimates = tuple[Tensor, Tensor, Tensor, Tensor]  # eps_uncond, eps_text, eps_edits, momentum


@st.composite
def steps(draw: st.DrawFn) -> tuple[Estimates, dict[str, object]]:
    """Random estimates of two samples and random options of all kinds, as lists."""
    count, trailing = draw(st.integers(1, 4)), draw(st.sampled_from([(5, 7), (33,), (2, 3, 5)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    eps = torch.randn(3 + count, 2, 3, *trailing, generator=generator, dtype=dtype)
    values = {
        "edit_guidance_scale": st.floats(-8, 8, width=16),
        "edit_threshold": st.floats(0, 1),
        "edit_weights": st.floats(-0.5, 2, width=16),
        **dict.fromkeys(("warm", "enabled", "reverse"), st.booleans()),
    }
    options = {
        name: draw(st.lists(value, min_size=count, max_size=count))
        for name, value in values.items()
    }
    if draw(st.booleans()):
        options["warm"] = [True] * count
    options["sum_channels"] = draw(st.booleans())
    return (eps[0], eps[1], eps[3:], eps[2]), {**options, **NUMBERS}


def assert_equal_to_rounding(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Sums of about ten terms in another order."""
    for result, other in zip(results, expected, strict=True):
        scale = max(1.0, other.abs().max().item())
        torch.testing.assert_close(
            result, other, rtol=0, atol=64 * torch.finfo(other.dtype).eps * scale
        )


@every_backend
@properties
@given(problem=steps())
def test_threshold_0_is_composable_diffusion(backend: str, problem: tuple) -> None:
    """The weighted sum of all differences; reversed concepts are weighted negative prompts."""
    (uncond, text, edits, momentum), options = problem
    options = {**options, "edit_threshold": 0.0, "warm": True, "edit_momentum_scale": 0.0}
    eps, _ = sega_guidance(uncond, text, edits, momentum, **options, backend=backend)
    expected = uncond + 7.5 * (text - uncond)
    names = ("edit_guidance_scale", "edit_weights", "enabled", "reverse")
    for edit, scale, weight, on, negative in zip(edits, *(options[name] for name in names)):
        expected = expected + max(weight, 0) * on * scale * (-1 if negative else 1) * (
            edit - uncond
        )
    assert_equal_to_rounding((eps,), (expected,))


@every_backend
@properties
@given(problem=steps())
def test_reversed_is_a_negative_scale(backend: str, problem: tuple) -> None:
    tensors, options = problem
    negated = [-scale for scale in options["edit_guidance_scale"]]
    other = {
        **options,
        "edit_guidance_scale": negated,
        "reverse": [not one for one in options["reverse"]],
    }
    for result, expected in zip(
        *(sega_guidance(*tensors, **each, backend=backend) for each in (options, other))
    ):
        same_bits(result, expected)


@every_backend
@properties
@given(problem=steps(), seed=st.integers(0, 100))
def test_the_order_of_concepts_does_not_matter(backend: str, problem: tuple, seed: int) -> None:
    (uncond, text, edits, momentum), options = problem
    order = torch.randperm(len(edits), generator=torch.Generator().manual_seed(seed)).tolist()
    other = {name: [options[name][i] for i in order] for name in LISTS}
    results = sega_guidance(uncond, text, edits, momentum, **options, backend=backend)
    expected = sega_guidance(
        uncond, text, edits[order], momentum, **{**options, **other}, backend=backend
    )
    assert_equal_to_rounding(results, expected)


@every_backend
@properties
@given(problem=steps())
def test_a_concept_not_enabled_counts_in_warm_alone(backend: str, problem: tuple) -> None:
    """Warm it is as if absent; not warm it still holds the others back, as one of weight 0 does."""
    (uncond, text, edits, momentum), options = problem
    on = [True] * (len(edits) - 1)
    call = partial(sega_guidance, backend=backend)
    results = call(uncond, text, edits, momentum, **{**options, "enabled": [False, *on]})
    weightless = {"enabled": [True, *on], "edit_weights": [0.0, *options["edit_weights"][1:]]}
    for result, expected in zip(
        results, call(uncond, text, edits, momentum, **{**options, **weightless})
    ):
        same_bits(result, expected)
    if options["warm"][0]:
        others = {name: options[name][1:] for name in LISTS}
        expected = call(uncond, text, edits[1:], momentum, **{**options, **others, "enabled": on})
        assert_equal_to_rounding(results, expected)
    else:  # no concept's push arrives in full
        nothing = call(
            uncond, text, edits, momentum, **{**options, "enabled": [False, *on], "warm": False}
        )
        same_bits(results[1], nothing[1])


@every_backend
@properties
@given(problem=steps(), exponent=st.integers(-20, 20))
def test_a_power_of_two_passes_through(backend: str, problem: tuple, exponent: int) -> None:
    tensors, options = problem
    results = sega_guidance(*tensors, **options, backend=backend)
    scaled = sega_guidance(*(x * 2.0**exponent for x in tensors), **options, backend=backend)
    for result, expected in zip(scaled, results):
        same_bits(result, expected * 2.0**exponent)


@every_backend
@properties
@given(problem=steps())
def test_samples_know_nothing_of_each_other(backend: str, problem: tuple) -> None:
    (uncond, text, edits, momentum), options = problem
    call = partial(sega_guidance, **options, backend=backend)
    both = call(uncond, text, edits, momentum)
    alone = call(uncond[1:], text[1:], edits[:, 1:], momentum[1:])
    for result, expected in zip(alone, both):
        same_bits(result, expected[1:])


@every_backend
@properties
@given(problem=steps())
def test_a_mask_weighs_what_is_kept(backend: str, problem: tuple) -> None:
    """All ones change nothing; one number a concept is its weight, where no other depends on it."""
    tensors, options = problem
    call = partial(sega_guidance, *tensors, backend=backend)
    for ones in (torch.ones((), dtype=torch.bool), torch.ones(1, 1, dtype=tensors[0].dtype)):
        for result, expected in zip(call(**options, user_mask=ones), call(**options)):
            same_bits(result, expected)
    weights = torch.tensor(options["edit_weights"], dtype=tensors[0].dtype).clamp(min=0)
    options = {**options, "warm": True}
    masked = call(
        **{**options, "edit_weights": 1.0}, user_mask=weights.reshape(-1, *[1] * tensors[0].dim())
    )
    assert_equal_to_rounding(masked, call(**options))


@every_backend
@pytest.mark.parametrize("sequence", [list, tuple])
def test_a_sequence_of_edits_is_their_stack(backend: str, sequence: type) -> None:
    eps = torch.randn(5, 2, 3, 4, 5)
    options = {
        **{name: values[:3] for name, values in LISTS.items()},
        **NUMBERS,
        "backend": backend,
    }
    expected = sega_guidance(eps[0], eps[1], eps[2:], None, **options)
    arrays = {
        name: torch.tensor(options[name]).double()
        for name in ("edit_guidance_scale", "edit_weights")
    }
    for result, other in zip(
        sega_guidance(eps[0], eps[1], sequence(eps[2:]), None, **{**options, **arrays}), expected
    ):
        torch.testing.assert_close(result, other)


@every_backend
def test_zero_over_zero_is_no_addition(backend: str) -> None:
    """All warm concepts are over while another warms up: diffusers divides 0 by 0 there."""
    eps = torch.randn(4, 1, 4, 8, 8, dtype=torch.float64)
    guidance = SemanticGuidance(
        guidance_scale=3.0, edit_warmup_steps=[0, 9], edit_cooldown_steps=[0, None], backend=backend
    )
    for step in range(3):
        result = guidance(step, eps[0], eps[1], eps[2:])
        torch.testing.assert_close(result, eps[0] + 3.0 * (eps[1] - eps[0]), rtol=1e-14, atol=1e-14)
    assert (guidance.momentum != 0).any()


@every_backend
def test_the_class_is_the_rules_of_the_steps(backend: str) -> None:
    eps = torch.randn(6, 5, 2, 3, 4, 5)  # steps
    options = {
        **NUMBERS,
        "edit_guidance_scale": [5, 3, -2],
        "edit_threshold": 0.8,
        "edit_weights": None,
    }
    rules = {"edit_warmup_steps": [0, 2, 3], "edit_cooldown_steps": [5, None, 4]}
    guidance = SemanticGuidance(**options, **rules, reverse_editing_direction=True, backend=backend)
    for _ in range(2):
        momentum = None
        for step, (uncond, text, *edits) in enumerate(eps):
            expected, momentum = sega_guidance(
                uncond,
                text,
                edits,
                momentum,
                **{**options, "edit_weights": 1.0},
                warm=[True, step >= 2, step >= 3],
                enabled=[step < 5, True, step < 4],
                reverse=True,
                backend=backend,
            )
            same_bits(guidance(step, uncond, text, edits), expected)
            same_bits(guidance.momentum, momentum)
        guidance.reset()
