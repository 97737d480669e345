"""A short run of the fuzzer; `make sanitize` makes 10,000 calls under AddressSanitizer."""

from __future__ import annotations

import pytest
from cases import why_skip
from fuzz import fuzz


@pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
def test_random_calls_run_or_refuse() -> None:
    outcomes = fuzz(calls=1000, seed=1)
    expected = {"public_call ran", "public_call refused", "raw_call ran", "raw_call refused"}
    assert outcomes.keys() == expected  # none refused without a word
    assert min(outcomes.values()) > 100
