"""Plans of semantic guidance: steps of a form are checked once, with the bits of those that are
checked each time.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sega_cases import LISTS, NUMBERS
from torch import Tensor

from dense_attn import SemanticGuidance, sega_guidance
from dense_attn._backends import plans
from dense_attn.sega import inputs, op

E, B, C, H, W = 3, 2, 4, 5, 7
OPTIONS = {**{name: list(values[:E]) for name, values in LISTS.items()}, **NUMBERS}


class Other(Tensor):
    """A tensor of another kind than torch's."""


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The checks of estimates that are made meanwhile."""
    found, check = [], inputs.estimates
    noted = lambda *given: (found.append(1), check(*given))[1]  # noqa: E731
    monkeypatch.setattr(inputs, "estimates", noted)
    return found


def given() -> dict[str, object]:
    uncond, text, momentum = torch.randn(3, B, C, H, W).unbind(0)
    edits = torch.randn(E, B, C, H, W)
    return {"eps_uncond": uncond, "eps_text": text, "eps_edits": edits, "momentum": momentum}


def run(arguments: dict[str, object], **change: object) -> tuple[Tensor, Tensor]:
    return sega_guidance(**{**OPTIONS, **arguments, **change})


FORMS = {
    "whole": lambda x: {},
    "no momentum": lambda x: {"momentum": None},
    "narrow momentum": lambda x: {
        name: value.half() for name, value in x.items() if name != "user_mask"
    },
    "bool mask": lambda x: {"user_mask": torch.rand(H, W) > 0.5},
    "mask": lambda x: {"user_mask": torch.rand(E, B, C, H, W)},
    "mask apart": lambda x: {"user_mask": torch.rand(H, 1).expand(E, B, C, H, W)},
    "momentum apart": lambda x: {"momentum": x["momentum"].mT.contiguous().mT},
    "edits apart": lambda x: {"eps_edits": x["eps_edits"].mT.contiguous().mT},
    "channels last": lambda x: {
        "eps_uncond": x["eps_uncond"].contiguous(memory_format=torch.channels_last)
    },
    "apart": lambda x: {"eps_text": x["eps_text"].mT.contiguous().mT},
    "sums": lambda x: {"sum_channels": True},
    "no axes": lambda x: {name: value[..., 0, 0] for name, value in x.items()},
    "one axis": lambda x: {name: value.flatten(-2) for name, value in x.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_checked_once_and_its_results_stay(form: str, checked: list[int]) -> None:
    """The first call comes after one of another form."""
    call = given()
    run(call)
    call |= FORMS[form](call)
    first, again = run(call), run(call)
    assert len(checked) == (1 if form in ("whole", "sums") else 2)
    plans.forget()
    for results in (again, run(call), run(call, backend="reference")):
        for got, expected in zip(results, first, strict=True):
            torch.testing.assert_close(got, expected)
            assert got.shape == expected.shape
    assert all(map(torch.equal, first, again))


def test_masks_of_other_strides_have_their_own() -> None:
    call, mask = given(), torch.rand(E, B, C, H, W)
    for apart in (mask, mask.mT.contiguous().mT):
        results = run(call, user_mask=apart)
        assert all(map(torch.equal, results, run(call, user_mask=mask)))
    assert [plan.whole for plan in op._plans._kept.values()] == [True, False]


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_calls_without_plans(form: str) -> None:
    found = []
    call = given()
    call |= FORMS[form](call)
    for _ in range(2):
        leaves = {n: x.clone().requires_grad_() for n, x in call.items() if n.startswith("eps")}
        run(call)
        sum(x.square().sum() for x in run(call | leaves)).backward()
        found.append([x.grad for x in leaves.values()])
        plans.forget()
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda x: {"eps_uncond": x["eps_uncond"].long()}, "eps_uncond must be one of float32"),
        (lambda x: {"eps_text": x["eps_text"].double()}, "eps_text must have eps_uncond's dtype"),
        (lambda x: {"eps_text": x["eps_text"][:1]}, "eps_text must have eps_uncond's shape"),
        (lambda x: {"eps_text": x["eps_text"].to_sparse()}, "eps_text must be a strided tensor"),
        (lambda x: {"eps_text": x["eps_text"].to("meta")}, "eps_text must be on eps_uncond's dev"),
        (lambda x: {"eps_edits": x["eps_edits"][:, :1]}, "eps_edits must have shape"),
        (lambda x: {"eps_edits": x["eps_edits"][:2]}, "must be one value or 2"),
        (lambda x: {"momentum": x["momentum"].double()}, "momentum must be float32"),
        (lambda x: {"momentum": x["momentum"][:1]}, "momentum must have eps_uncond's shape"),
        (lambda x: {"momentum": 0.0}, "momentum must be a tensor"),
        (lambda x: {"user_mask": torch.ones(H, W).long()}, "user_mask must be float32 or bool"),
        (lambda x: {"user_mask": torch.ones(2, W)}, "user_mask must broadcast"),
        (lambda x: {"edit_threshold": [0.5, 0.5, 1.1]}, "edit_threshold must be from 0 to 1"),
        (lambda x: {"edit_threshold": float("nan")}, "edit_threshold must be finite"),
        (lambda x: {"guidance_scale": 1e39}, "guidance_scale must be finite in float32"),
        (lambda x: {"warm": 1}, "warm must be a bool"),
        (lambda x: {"sum_channels": 0}, "sum_channels must be a bool"),
        (lambda x: {"backend": "opencl"}, "backend must be one of"),
        (lambda x: {"backend": ["cpu"]}, "backend must be one of"),
    ],
)
def test_what_is_wrong_is_refused_after_what_is_right(change: Callable, rule: str) -> None:
    call = given()
    run(call)
    with pytest.raises((TypeError, ValueError), match=rule):
        run({**call, **change(call)})


def test_steps_are_checked_once(checked: list[int]) -> None:
    """And refused where they do not go with those before."""
    call, guidance = given(), SemanticGuidance(edit_warmup_steps=[0, 1, 2])
    tensors = call["eps_uncond"], call["eps_text"], call["eps_edits"]
    for step in range(4):
        guidance(step, *tensors)
    assert len(checked) == 2  # without a momentum and with one
    guidance.guidance_scale = float("nan")
    with pytest.raises(ValueError, match="guidance_scale must be finite"):
        guidance(4, *tensors)
    guidance.guidance_scale = 7.5
    guidance(0, *(x[..., 1:, :] for x in tensors))
    with pytest.raises(ValueError, match="eps_uncond must go with the momentum of the steps"):
        guidance(1, *tensors)


def test_options_of_a_step_do_not_tell_of_those_before() -> None:
    """Concepts begin and end at any time, and steps come in any order."""
    rules = {"edit_warmup_steps": [0, 2.5, 4, 4], "edit_cooldown_steps": [3, None, 5, 4]}
    rules |= {"edit_weights": [1.0, 2.0, -1.0, 0.5]}
    guidance = SemanticGuidance(**rules)
    for step in (6, 0, 2, 3, 5, 4, 1, 3, 0):
        fresh = SemanticGuidance(**rules)
        options = guidance._options(step, 4, torch.float32)
        assert options == fresh._options(step, 4, torch.float32)
        weights = [1.0 * (step < 3), 2.0, 0.0, 0.5 * (step < 4)]
        assert options[3] == weights
        assert options[5] is (step >= 4)


def test_what_is_for_once_is_not_kept() -> None:
    """Calls on subclasses, of a trace and of a compiled graph."""
    call, kept = given(), op._plans._kept
    run(call | {"eps_text": call["eps_text"].as_subclass(Other)})
    traced = lambda x: run(call | {"eps_text": x}, backend="reference")  # noqa: E731
    torch.jit.trace(traced, call["eps_text"], check_trace=False)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = compiled(call)
    assert not kept
    for got, result in zip(run(call), expected, strict=True):
        torch.testing.assert_close(got, result)
    assert len(kept) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):  # for plans that came meanwhile
        assert all(map(torch.equal, compiled(call), expected))


def test_traces_leave_nothing_behind() -> None:
    """Numbers of a trace are no keys that a later call could find."""
    call, guidance = given(), SemanticGuidance(backend="reference")
    tensors = call["eps_uncond"], call["eps_text"], call["eps_edits"]

    def first(*tensors: Tensor) -> Tensor:
        guidance.reset()
        return guidance(0, *tensors)

    for _ in range(3):
        torch.jit.trace(first, tensors, check_trace=False)
    assert len(guidance._lists) == len(guidance._eras) == 1


def test_a_graph_keeps_no_options_that_the_next_is_guarded_by() -> None:
    call, guidance = given(), SemanticGuidance(backend="reference", edit_warmup_steps=1)
    tensors = call["eps_uncond"], call["eps_text"], call["eps_edits"]
    compiled = torch.compile(guidance.__call__, backend="eager")
    for _ in range(2):
        guidance.reset()
        for step in range(3):
            compiled(step, *tensors)
    assert not guidance._eras
