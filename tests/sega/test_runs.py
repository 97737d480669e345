"""Where a run of semantic guidance begins and ends: many images, edits that never begin."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import pytest
import torch
from torch import Tensor

from dense_attn import SemanticGuidance

RULES = {"edit_warmup_steps": [1, 0], "edit_threshold": 0.5, "backend": "reference"}


def eps(seed: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    uncond, text, *edits = torch.randn(4, batch, 4, 5, 7, generator=generator)
    return uncond, text, torch.stack(edits)


def loop(
    guidance: SemanticGuidance, steps: Iterable[int], image: int = 0, batch: int = 1
) -> list[Tensor]:
    return [guidance(step, *eps(100 * image + call, batch)) for call, step in enumerate(steps)]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(map(torch.equal, a, b))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (range(5), range(5)),
        (range(5), range(1)),
        (range(1), range(3)),
        (range(3, 8), range(3, 8)),  # img2img leaves out the first steps
        (range(3, 8), range(2, 8)),
        (range(5), range(2, 5)),
        (range(2, 9), range(5)),
        ([0, 1, 1, 2], [0, 1, 1, 2]),
    ],
    ids=str,
)
def test_a_second_run_is_as_if_it_were_the_first(
    first: Iterable[int], second: Iterable[int]
) -> None:
    guidance = SemanticGuidance(**RULES)
    loop(guidance, first, image=1)
    assert same(loop(guidance, second), loop(SemanticGuidance(**RULES), second))


def test_a_second_run_may_have_another_shape_and_dtype() -> None:
    guidance = SemanticGuidance(**RULES)
    loop(guidance, range(3))
    assert same(
        loop(guidance, range(3), batch=2), loop(SemanticGuidance(**RULES), range(3), batch=2)
    )
    guidance(0, *(x.double() for x in eps(0)))
    assert guidance.momentum.dtype == torch.float64


def test_momentum_goes_on_within_a_run() -> None:
    """Also with a network called twice a step, and in a run of later steps that follows none."""
    for steps in ([0, 1, 2], [0, 1, 1, 2, 2], [4, 4, 5]):
        guidance, anew = SemanticGuidance(**RULES), []
        momenta = []
        for call, step in enumerate(steps):
            before = None if guidance.momentum is None else guidance.momentum.clone()
            fresh = SemanticGuidance(**RULES)
            anew.append(fresh(step, *eps(call)))
            guidance(step, *eps(call))
            momenta.append((before, guidance.momentum, fresh.momentum))
        for before, after, without in momenta[1:]:
            assert before is not None
            assert not torch.equal(after, without)


def test_a_refused_call_begins_no_run() -> None:
    guidance = SemanticGuidance(**RULES)
    loop(guidance, range(3))
    before, copied = guidance.momentum.clone(), copy.deepcopy(guidance)
    for step in (0, 1):
        with pytest.raises(ValueError, match="eps_edits must have shape"):
            guidance(step, *eps(7)[:2], eps(7)[2][:, :, :1])
    assert torch.equal(guidance.momentum, before)
    assert torch.equal(guidance(3, *eps(8)), copied(3, *eps(8)))


def test_a_momentum_that_was_kept_goes_on() -> None:
    whole, part, rest = (SemanticGuidance(**RULES) for _ in range(3))
    expected = loop(whole, range(5))
    loop(part, range(3))
    for used in (False, True):
        if used:
            loop(rest, range(7, 9), image=1)
            rest.reset()
        rest.momentum = part.momentum
        assert same([rest(step, *eps(step)) for step in (3, 4)], expected[3:])


def test_reset_forgets_in_the_middle() -> None:
    guidance = SemanticGuidance(**RULES)
    loop(guidance, range(3, 6), image=1)
    guidance.reset()
    assert guidance.momentum is None
    assert same(loop(guidance, range(8, 10)), loop(SemanticGuidance(**RULES), range(8, 10)))
