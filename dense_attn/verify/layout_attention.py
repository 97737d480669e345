"""`verify` for layout attention: results and gradients by the rule of accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn._backends.contract import MODULATIONS

from .accuracy import DTYPES, Verdict, attempt, further, judge, raised, ratio, usable, why_not
from .calls import HALF, RESULTS, AttentionCall

# The results that `judge` compares a backend's with, by the name of the call.
Expected = dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]


def exact_and_plain(
    given: AttentionCall, modulation: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The results that `judge` compares a backend's with, for a call in the dtype under test."""
    exact = given.cast(torch.float64).run(modulation, "reference")
    if given.q.dtype != torch.float64:
        return exact, given.run(modulation, "reference")
    # nothing is wider than float64: what other orders of its sums make of it, at their worst
    plain = exact
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        keys = torch.randperm(given.k.shape[2], generator=generator, device="cpu")
        dims = torch.randperm(given.k.shape[3], generator=generator, device="cpu")
        other = given.reordered(keys, dims).run(modulation, "reference")
        own_keys, own_dims = keys.argsort(), dims.argsort()
        other["dq"], other["dv"] = other["dq"][..., own_dims], other["dv"][:, :, own_keys]
        other["dk"] = other["dk"][:, :, own_keys][..., own_dims]
        plain = {name: further(plain[name], other[name], exact[name]) for name in RESULTS}
    return exact, plain


def refused(backend: str, given: AttentionCall, dtype: torch.dtype) -> str:
    """The reasons why a backend cannot take a call in a dtype, "" if it can."""
    return "; ".join(why_not(backend, "layout_attention", dtype, given.q.shape[3]))


def verify(backends: Sequence[str], given: Sequence[AttentionCall]) -> Iterator[Verdict]:
    """One verdict for each of these backends that is available, dtype and modulation, on the calls
    that it can take.
    """
    for dtype in DTYPES:
        available = usable("layout_attention", dtype, backends)
        narrow = [one.cast(dtype) for one in given if one.only is None or dtype in HALF]
        for modulation in MODULATIONS:
            expected: Expected = {}
            for backend in available:
                taken = [
                    one
                    for one in narrow
                    if one.concerns(backend, modulation) and not refused(backend, one, dtype)
                ]
                for one in taken:
                    if one.name not in expected:
                        expected[one.name] = exact_and_plain(one, modulation)
                yield attempt(_verdict, backend, dtype, modulation, taken, expected)


def _verdict(
    backend: str,
    dtype: torch.dtype,
    modulation: str,
    taken: list[AttentionCall],
    expected: Expected,
) -> Verdict:
    """The worst of all calls, for each result."""
    ratios, worst = dict.fromkeys(RESULTS, 0.0), ""
    for given in taken:
        exact, plain = expected[given.name]
        try:
            outputs = given.run(modulation, backend)
        except Exception as error:
            return raised(backend, dtype, modulation, error, by=f"{given.name}: ")
        for name, got in outputs.items():
            results = got, exact[name], plain[name], dtype
            found = ratio(*results)
            if found >= max(ratios.values()):
                error, allowed = judge(*results)
                worst = f"{name} of {given.name}: error {error:.2g}, allowed {allowed:.2g}"
            ratios[name] = max(ratios[name], found)
    control = _control(taken[0], *expected[taken[0].name], modulation, backend)
    return Verdict(backend, _checks.name(dtype), modulation, ratios, control, worst=worst)


def _control(
    given: AttentionCall,
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    modulation: str,
    backend: str,
) -> float:
    """error / allowed of an output computed with one region bit of the first query flipped."""
    flipped = given.q_regions.clone()
    flipped[:, 0] ^= 1
    got = replace(given, q_regions=flipped).run(modulation, backend)["out"]
    return ratio(got, exact["out"], plain["out"], given.q.dtype)
