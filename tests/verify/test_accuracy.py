"""The rule of accuracy can fail: what it allows, and what it never does."""

from __future__ import annotations

import pytest
import torch

from dense_attn.verify.accuracy import Verdict, judge

EXACT = torch.tensor([1.0, -2.0, 4.0], dtype=torch.float64)
PLAIN = EXACT + torch.tensor([0.0, 1e-6, 0.0])


def test_judge_allows_twice_the_plain_error_and_one_rounding() -> None:
    error, allowed = judge(EXACT + 3e-6, EXACT, PLAIN, torch.float32)
    assert error == pytest.approx(3e-6)
    assert allowed == pytest.approx(2e-6 + 4 * 2**-23)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_judge_refuses_what_is_not_finite_where_it_should_be(wrong: float) -> None:
    error, allowed = judge(torch.tensor([wrong, -2.0, 4.0]), EXACT, PLAIN, torch.float32)
    assert error > allowed


def test_judge_wants_the_same_infinities_and_nans() -> None:
    exact = torch.tensor([float("nan"), -float("inf"), 1.0], dtype=torch.float64)
    error, allowed = judge(exact, exact, exact, torch.float32)
    assert error <= allowed
    for other in (torch.tensor([0.0, -torch.inf, 1.0]), torch.tensor([torch.nan, torch.inf, 1.0])):
        assert judge(other, exact, exact, torch.float32)[0] == float("inf")


def test_judge_lets_an_overflowing_plain_run_allow_nothing() -> None:
    plain = torch.tensor([float("inf"), -2.0, 4.0])
    error, allowed = judge(EXACT + 1e-3, EXACT, plain, torch.float32)
    assert error > allowed


def test_a_row_fails_where_its_control_does() -> None:
    """And where one of its numbers is above the limit."""
    bits, guidance = ("cpu", "float32", "bits"), ("cpu", "float32", "guidance")
    assert Verdict(*bits, {"bits": 0}, 1, limit=0).passed
    assert not Verdict(*bits, {"bits": 0}, 0, limit=0).passed
    assert not Verdict(*bits, {"bits": 1}, 1, limit=0).passed
    assert Verdict(*guidance, {"eps": 0.2, "momentum": 0.5}, 1.5).passed
    assert not Verdict(*guidance, {"eps": 0.2, "momentum": 1.01}, 1.5).passed
    assert not Verdict(*guidance, {"eps": 0.2}, 0.9).passed
