"""The rule of modulation of one row that CUDA's attention kernels share, compiled for the CPU."""

from __future__ import annotations

import ctypes
import math
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from cases import MODULATIONS
from torch import Tensor

from dense_attn.reference.layout_attention import modulate

ROOT = Path(__file__).resolve().parents[2]
RULES = """
#include "layout_attention_rules.h"
template <Modulation kModulation>
void apply(const float* row, float* rule, float* finished) {
  const RowRule r = row_rule<kModulation>(row[0], row[1], row[2], row[3]);
  const float numbers[] = {r.factor, r.anchor, r.offset_in, r.offset_out, r.common};
  for (int i = 0; i < 5; ++i) rule[i] = numbers[i];
  const RowMerge m = merge_states(r, row[4], row[5], row[6], row[7]);
  const float sum = m.weight_in * row[4] + m.weight_out * row[6];
  const RowOffsets offsets = record_offsets(r, m.largest, sum);
  const float lse = row_lse(r, m.largest, sum);
  const float ends[] = {m.weight_in, m.weight_out, lse, offsets.in, offsets.out};
  for (int i = 0; i < 5; ++i) finished[i] = ends[i];
}
extern "C" void apply_rule(int modulation, const float* row, float* rule, float* finished) {
  using Apply = void(const float*, float*, float*);
  Apply* all[] = {apply<Modulation::kRange>, apply<Modulation::kMax>, apply<Modulation::kBias>,
                  apply<Modulation::kMask>};
  all[modulation](row, rule, finished);
}
"""
Rule = tuple[float, float, float, float, float]


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The rules in a library of their own."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C++ compiler")
    folder = tmp_path_factory.mktemp("rules")
    source, library = folder / "rules.cpp", folder / "rules.so"
    source.write_text(RULES)
    flags = ("-std=c++20", "-O2", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    command = [*compiler, *flags, f"-I{ROOT / 'csrc'}", source, "-o", library]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def apply(
    rules: ctypes.CDLL,
    modulation: str,
    row: tuple[float, ...],
    states: tuple[float, ...] = (0,) * 4,
) -> tuple[Rule, Rule]:
    """The rule of a row of (strength, scale, raw maximum, minimum); what becomes of two states."""
    given, rule, finished = ((ctypes.c_float * size)() for size in (8, 5, 5))
    given[:] = *row, *states
    rules.apply_rule(MODULATIONS.index(modulation), given, rule, finished)
    return tuple(rule), tuple(finished)


def exact_weights(raw: Tensor, matched: Tensor, c: float, scale: float, modulation: str) -> tuple:
    """(weights, lse) of a row of raw scores in float64."""
    scores = modulate(raw * scale, matched, c, modulation)
    lse = scores.logsumexp(-1)
    return (scores - lse.clamp_min(-1e300)).exp(), lse


def states(raw: Tensor, matched: Tensor, factor: float) -> tuple[float, ...]:
    """(sum, shift) of the matched keys and of the others, 0 where there is none."""
    numbers = []
    for part in (raw[matched], raw[~matched]):
        shift = (part * factor).max() if part.numel() else torch.zeros((), dtype=torch.float64)
        numbers += [torch.exp2(part * factor - shift).sum().item(), shift.item()]
    return tuple(numbers)


STRENGTHS = (0.0, 0.3, 1.0, 1.8, -0.5, 20.0, -30.0)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("modulation", MODULATIONS)
@pytest.mark.parametrize("words", ["some", "all", "none"])
def test_a_row_by_its_rule_is_the_reference(
    rules: ctypes.CDLL, modulation: str, strength: float, words: str
) -> None:
    """Weights by the record's offsets, and lse, of a row whose two states are merged."""
    generator = torch.Generator().manual_seed(7)
    raw = torch.randn(50, generator=generator, dtype=torch.float64).float().double() * 8
    matched = torch.rand(50, generator=generator, dtype=torch.float64) < 0.4
    matched = {"some": matched, "all": matched | True, "none": matched & False}[words]
    scale = 0.25
    strength = ctypes.c_float(strength).value
    counted = raw[matched] if modulation == "mask" and matched.any() else raw
    row = (strength, scale, counted.max().item(), counted.min().item())
    if modulation == "mask" and not matched.any():
        row = (strength, scale, -math.inf, -math.inf)
    (factor, anchor, *_), _ = apply(rules, modulation, row)
    merged = states(raw, matched, factor)
    if modulation == "mask":
        merged = (*merged[:2], 0.0, 0.0)
    _, (_, _, lse, offset_in, offset_out) = apply(rules, modulation, row, merged)
    offsets = torch.where(matched, offset_in, offset_out)
    weights = torch.exp2((raw - anchor) * factor + offsets)
    expected, expected_lse = exact_weights(raw, matched, strength, scale, modulation)
    torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(torch.tensor(lse).double(), expected_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("strength", [1e4, -1e4, 9999.5])
def test_lse_of_large_strengths_is_not_a_difference_of_large_numbers(
    rules: ctypes.CDLL, strength: float
) -> None:
    """The term of both populations is the extreme that weighs most: (1 - c) * x + c * x is x."""
    (*_, common), _ = apply(rules, "range", (strength, 1.0, 5.3, 1.1))
    assert common == ctypes.c_float(5.3 if strength < 1 else 1.1).value


@pytest.mark.parametrize("infinite", ["max", "min", "both"])
@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0, 1.7, -0.6])
def test_infinite_extremes_are_those_of_the_definition(
    rules: ctypes.CDLL, strength: float, infinite: str
) -> None:
    """Which rows are numbers, by population, is what float64 says of them."""
    raw = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    if infinite != "min":
        raw[0] = math.inf
    if infinite != "max":
        raw[1] = -math.inf
    strength = ctypes.c_float(strength).value
    for bits in range(8):
        matched = torch.tensor([bits >> i & 1 for i in range(3)]) != 0
        row = (strength, 1.0, raw.max().item(), raw.min().item())
        (factor, anchor, offset_in, offset_out, _), _ = apply(rules, "range", row)
        exponents = (raw - anchor) * factor + torch.where(matched, offset_in, offset_out)
        top = exponents[exponents.isfinite()].max() if exponents.isfinite().any() else 0.0
        weights = torch.exp2(exponents - top)
        weights = weights / (1 if weights.sum() == 0 else weights.sum())
        exact, _ = exact_weights(raw, matched, strength, 1.0, "range")
        assert weights.isnan().any() == exact.isnan().any()
        if not exact.isnan().any() and exact.sum() > 0:
            torch.testing.assert_close(weights, exact, rtol=1e-5, atol=1e-7)


def test_a_row_without_keys_weighs_nothing(rules: ctypes.CDLL) -> None:
    _, finished = apply(rules, "mask", (0.5, 1.0, -math.inf, -math.inf))
    assert finished == (0.0, 0.0, -math.inf, -math.inf, -math.inf)
