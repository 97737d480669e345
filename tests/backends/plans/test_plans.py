"""Plans: a call of a form that was let through is not checked again, and nothing else is spared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dense_attn import layout_attention, percentile_mask
from dense_attn._backends import choice, plans
from dense_attn.layout_attention import inputs, planned
from dense_attn.sega import percentile

B, H, M, D = 2, 3, 6, 8


class Other(Tensor):
    """A tensor of another kind than torch's."""


@pytest.fixture(autouse=True)
def kept() -> Iterator[dict]:
    plans.forget()
    yield planned.known._kept
    plans.forget()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The checks of tensors that are made meanwhile."""
    found, check = [], inputs.check_tensors
    noted = lambda *given: (found.append(1), check(*given))[1]  # noqa: E731
    monkeypatch.setattr(inputs, "check_tensors", noted)
    return found


def good(heads: int = H) -> dict[str, object]:
    words = torch.arange(M, dtype=torch.int32)
    q, k, v = torch.randn(3, B, heads, M, D).unbind(0)
    return {"q": q, "k": k, "v": v, "q_regions": words, "k_regions": words}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strength": 0.3},
        {"strength": torch.rand(B, H, M)},
        {"strength": torch.rand(M)},
        {"strength": torch.rand(B, H, M), "scale": 0.2, "return_lse": True},
        {"q_order": torch.arange(M).flip(0).int(), "k_order": False},
        {"k_mask": torch.arange(M) < 4},
        {"k_mask": torch.randn(M)},
        {"modulation": "mask", "backend": "reference"},
    ],
)
def test_a_form_is_checked_once_and_its_results_stay(
    counted: list[int], options: dict[str, object]
) -> None:
    given = good()
    first, again = (layout_attention(**given, **options) for _ in range(2))
    assert len(counted) == 1
    for x, y in zip(*(r if isinstance(r, tuple) else (r,) for r in (first, again)), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("argument", "change"),
    [
        ("q", lambda x: x.double()),
        ("q", lambda x: x.mT.contiguous().mT),
        ("q", lambda x: x[:1]),
        ("k", lambda x: x.to("meta")),
        ("v", lambda x: x.to_sparse()),
        ("q_regions", lambda x: x.long()),
        ("k_regions", lambda x: x[None]),
        ("k_regions", lambda x: x.as_subclass(Other)),
    ],
)
def test_another_form_is_checked(
    counted: list[int], argument: str, change: Callable[[Tensor], Tensor]
) -> None:
    given = good()
    layout_attention(**given)
    given[argument] = change(given[argument])
    with suppress(TypeError, ValueError):
        layout_attention(**given)
    assert len(counted) == 2


@pytest.mark.parametrize(
    "options",
    [{"q_order": False}, {"strength": torch.rand(M)}, {"modulation": "max"}, {"k_mask": None}],
)
def test_equal_values_of_other_types_are_told_apart(options: dict[str, object]) -> None:
    """0 is False and 1 is True to a dict, but not to the checks."""
    given = good()
    layout_attention(**given, **options)
    for wrong in ({"q_order": 0}, {"k_order": 0}, {"q_order": True}, {"return_lse": 1}):
        with pytest.raises(TypeError):
            layout_attention(**given, **options | wrong)


def test_words_that_were_resized_in_place_are_refused() -> None:
    given = good()
    layout_attention(**given)
    given["k_regions"] = given["k_regions"].clone()
    layout_attention(**given)
    given["k_regions"].resize_(M + 1)
    with pytest.raises(ValueError, match=r"k_regions must have shape .* got \(7,\)"):
        layout_attention(**given)


def test_few_are_kept(kept: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "_MOST", 3)
    for heads in range(1, 6):
        layout_attention(**good(heads))
        assert 1 <= len(kept) <= 3


def test_what_is_for_once_is_not_kept(kept: dict) -> None:
    """Calls on subclasses, of a trace and of a compiled graph."""
    given = good()
    layout_attention(**given | {"k_regions": given["k_regions"].as_subclass(Other)})
    torch.jit.trace(lambda q: layout_attention(**given | {"q": q}), given["q"], check_trace=False)
    compiled = torch.compile(layout_attention, fullgraph=True, backend="aot_eager")
    expected = compiled(**given)
    assert not kept
    assert torch.equal(layout_attention(**given), expected)
    assert len(kept) == 1
    with torch._dynamo.config.patch(error_on_recompile=True):  # for plans that came meanwhile
        assert torch.equal(compiled(**given), expected)


def test_a_verdict_is_heard(kept: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may change which backend goes first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layout_attention(**good())
    assert kept
    choice.remember("triton", "a GPU", passed=False)
    assert not kept


def test_percentile_masks_have_plans_too(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(4, 6), torch.randn(2, 3, 4, 5)
    axes = -1, 0, percentile.LAST_TWO
    expected = [percentile_mask(x, 0.5, dim=dim) for x in given for dim in axes]
    with monkeypatch.context() as context:
        context.setattr(percentile, "_axes", None)  # a new form would need it
        found = [percentile_mask(x, 0.5, dim=dim) for x in given for dim in axes]
    assert all(map(torch.equal, *map(flat, (found, expected))))
    for wrong in ({"level": 1.5}, {"dim": 2}, {"dim": True}, {"x": given[0].int()}, {"x": [1.0]}):
        with pytest.raises((TypeError, ValueError)):
            percentile_mask(**{"x": given[0], "level": 0.5, "dim": 1} | wrong)


def flat(results: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    return [x for pair in results for x in pair]
