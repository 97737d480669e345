"""A short run of the fuzzer; `make sanitize` makes 10,000 calls under AddressSanitizer."""

from __future__ import annotations

import pytest
from cases import why_skip
from fuzz import fuzz


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
def test_random_calls_run_or_refuse() -> None:
    """None is refused without a word."""
    outcomes = fuzz(calls=2000, seed=1)
    kinds = ("attention public", "attention raw", "family public", "family raw")
    assert outcomes.keys() == {f"{kind} {end}" for kind in kinds for end in ("ran", "refused")}
    assert min(outcomes.values()) > 80
