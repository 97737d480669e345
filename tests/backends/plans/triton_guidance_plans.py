"""Plans of Triton's raw calls of semantic guidance: found once for a form, and of no use to what
the check refuses.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from placed import same
from sega_cases import LISTS, NUMBERS, raw_options
from torch import Tensor

from dense_attn import SemanticGuidance, reference
from dense_attn._backends import plans, raw_checks, triton
from dense_attn.triton_kernels import sega

E, B, C, H, W = 3, 2, 2, 4, 5
INTERPRETED = triton.interpreted()
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="checks are the same on every device")


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The checks of calls that are made meanwhile."""
    found, check = [], raw_checks.sega.one_of
    noted = lambda *given: (found.append(1), check(*given))[1]  # noqa: E731
    monkeypatch.setattr(raw_checks.sega, "one_of", noted)
    return found


def given(concepts: int = E, dtype: torch.dtype = torch.float32) -> dict[str, object]:
    """Arguments of a raw call by their names."""
    uncond, text, momentum = torch.randn(3, B, C, H, W).unbind(0)
    tensors = {"eps_uncond": uncond.to(dtype), "eps_text": text.to(dtype)}
    tensors["eps_edits"] = torch.randn(concepts, B, C, H, W).to(dtype)
    lists = {name: (2 * list(values))[:concepts] for name, values in LISTS.items()}
    last = {"user_mask": None, "sum_channels": False}
    return {**tensors, "momentum": momentum, **raw_options({**lists, **NUMBERS}), **last}


def run(arguments: dict[str, object]) -> tuple[Tensor, ...]:
    tensors = [arguments[name] for name in ("eps_uncond", "eps_text", "eps_edits", "momentum")]
    return triton.sega_guidance(*tensors, **dict(list(arguments.items())[4:]))


@pytest.mark.parametrize("rows", ["whole", "staged", "long"])
@pytest.mark.parametrize("concepts", [0, 2, 9])
def test_a_form_is_checked_once_and_gives_the_same_bits(
    rows: str, concepts: int, checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its numbers."""
    for name in {"staged": ("UNSTAGED",), "long": ("LONGEST",)}.get(rows, ()):
        monkeypatch.setattr(sega, name, 0)
    call = given(concepts)
    other = given(concepts) | {"guidance_scale": 2.0, "weights": [0.5] * concepts}
    other |= {"edit_threshold": [0.25] * concepts, "reverse": [True] * concepts}
    for arguments in (call, call, other):
        same(run(arguments), reference.sega_guidance(**arguments))
    assert len(checked) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda x: given(dtype=torch.float16),
        lambda x: given(1),
        lambda x: given(9),
        lambda x: {"eps_text": x["eps_text"].to(memory_format=torch.channels_last)},
        lambda x: {"eps_edits": x["eps_edits"].transpose(0, 1).contiguous().transpose(0, 1)},
        lambda x: {"momentum": torch.zeros(()).expand(B, C, H, W)},
        lambda x: {"user_mask": torch.rand(E, B, C, H, W)},
        lambda x: {"sum_channels": True},
        lambda x: {name: x[name].flatten(-2) for name in list(x)[:4]},
    ],
    ids=[
        *("dtype", "concepts", "groups", "text strides", "edits strides", "momentum strides"),
        *("mask", "sums", "axes"),
    ],
)
def test_another_form_has_its_own(change: Callable, checked: list[int]) -> None:
    call = given()
    run(call)
    other = call | change(call)
    same(run(other), reference.sega_guidance(**other))
    assert len(checked) == 2


def test_masks_of_other_strides_have_their_own(checked: list[int]) -> None:
    call = given()
    for count, shape in enumerate([(E, B, C, H, W), (E, 1, 1, H, W), (1, 1, 1, 1, 1)], 1):
        call["user_mask"] = torch.rand(shape).expand(E, B, C, H, W)
        same(run(call), reference.sega_guidance(**call))
        assert len(checked) == count


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda x: {"eps_text": x["eps_text"].half()}, "eps_text must be float32"),
        (lambda x: {"eps_edits": x["eps_edits"][:, :1]}, "eps_edits must have shape"),
        (lambda x: {"momentum": x["momentum"].double()}, "momentum must be float32"),
        (lambda x: {"user_mask": torch.ones(E, B, C, H, W).half()}, "user_mask must be float32"),
        (lambda x: {"user_mask": torch.ones(H, W)}, "user_mask must have shape"),
        (lambda x: {"eps_uncond": x["eps_uncond"].mT.contiguous().mT}, "trailing axes that coll"),
        (lambda x: {"eps_edits": x["eps_edits"][:2]}, "edit_guidance_scale must have 2 entries"),
        (lambda x: {"partials": [0.0]}, "partials must have 3 entries, got 1"),
        (lambda x: {"reverse": [False] * 4}, "reverse must have 3 entries, got 4"),
        (lambda x: {"edit_threshold": [0.5, -0.1, 0.5]}, "edit_threshold must be from 0 to 1"),
        (lambda x: {"edit_threshold": [0.5, 0.5, 1.1]}, "edit_threshold must be from 0 to 1"),
        (lambda x: {"edit_threshold": [float("nan")] * 3}, "edit_threshold must be from 0 to 1"),
    ],
)
def test_what_is_wrong_is_refused_after_what_is_right(change: Callable, rule: str) -> None:
    call = given()
    run(call)
    with pytest.raises(RuntimeError, match=rule):
        run(call | change(call))


def test_public_steps_find_the_plan_past_torch(
    checked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the bits of those that go through it."""
    call, found = given(), []
    tensors = call["eps_uncond"], call["eps_text"], call["eps_edits"]
    for eager in (triton.EAGER, {}):
        plans.forget()
        checked.clear()
        monkeypatch.setattr(triton, "EAGER", eager)
        guidance = SemanticGuidance(edit_warmup_steps=[0, 1, 2], backend="triton")
        found.append([guidance(step, *tensors) for step in range(4)] + [guidance.momentum])
        assert len(checked) == 2  # the first momentum is one number
    assert all(map(torch.equal, *found))
