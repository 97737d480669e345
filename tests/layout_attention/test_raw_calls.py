"""Raw calls of layout attention's compiled ops: they refuse, and never crash."""

from __future__ import annotations

import re

import pytest
import raw
import torch
from cases import why_skip
from torch import Tensor

B, H, M, N, D = 2, 3, 5, 7, 8
needs_cpu_kernels = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))
ROWS = (B, H, M)
OPTIONS = ("modulation", "scale", "every_strength", "with_lse", "with_stats")
OPS = () if why_skip("cpu") else (raw.FWD, raw.BWD)
RAW = [(op, name) for op in OPS for name in raw.argument_names(op) if name not in OPTIONS]
LISTS = ("tiles", "counts", "k_words")  # which the CPU does not read: any size of them will do


def raw_arguments() -> raw.Arguments:
    """Raw calls that are right in every respect."""
    q, k, v = torch.randn(B, H, M, D), torch.randn(B, H, N, D), torch.randn(B, H, N, D)
    good = {
        "q": q,
        "k": k,
        "v": v,
        "strength": torch.rand(B, 1, M).expand(ROWS),
        "q_regions": torch.randint(0, 4, (M,), dtype=torch.int32),
        "k_regions": torch.randint(0, 4, (B, N), dtype=torch.int32),
        "modulation": "range",
        "scale": 0.3,
        "q_order": torch.arange(M, dtype=torch.int32),
        "k_order": torch.arange(N, dtype=torch.int32),
        "seqlens_k": torch.tensor([N - 2, N], dtype=torch.int32),
        **{name: torch.ones(1, 2, 3, dtype=torch.int32) for name in LISTS},
    }
    return raw.with_saved(good, grad_out=torch.randn(B, H, M, D), grad_lse=torch.randn(ROWS))


def spoiled(good: Tensor, argument: str) -> list[Tensor]:
    """Wrong dtypes, devices, layouts, ranks and lengths of a tensor argument."""
    dtypes = (torch.float64, torch.int64, torch.bool, torch.float16, torch.complex64)
    wrong = [*(good.to(dtype) for dtype in dtypes), good.to("meta"), good.to_sparse()]
    if argument in LISTS:
        return wrong
    wrong += [good[None, None, None], good[..., 0], good.new_zeros(0), good.new_zeros(())]
    wrong.append(good.new_zeros(*good.shape[:-1], good.shape[-1] + 3))
    wrong.append(good.new_zeros(3, *good.shape[1:]))
    if good.is_floating_point() and good.dim() == 4:  # the last axis not contiguous
        wrong.append(good.new_zeros(*good.shape[:-1], 2 * good.shape[-1])[..., ::2])
    if argument == "q_order":  # no permutations
        wrong += [good * 0, good + 1, good - 1, good * 2**30]
    if argument == "seqlens_k":  # more keys than there are, or fewer than none
        wrong += [good + 1, good - N, good * 2**30]
    return wrong


@needs_cpu_kernels
@pytest.mark.parametrize(("op", "argument"), RAW)
def test_raw_calls_refuse(op: str, argument: str) -> None:
    good = raw_arguments()
    raw.call(op, good)
    before = {name: x.clone() for name, x in good.items() if isinstance(x, Tensor)}
    for value in spoiled(good[argument], argument):
        with pytest.raises(RuntimeError) as refusal:
            raw.call(op, {**good, argument: value})
        if value.layout == torch.strided:
            assert re.match(r"(\w+, \S+, )?[a-z_]+ must .+, got .+", str(refusal.value)), (
                refusal.value
            )
    assert all(torch.equal(good[name], x) for name, x in before.items())


@needs_cpu_kernels
@pytest.mark.parametrize("op", [raw.FWD, raw.BWD])
def test_raw_calls_refuse_options(op: str) -> None:
    good = raw_arguments()
    for change in (
        {"modulation": ""},
        {"modulation": "rangee"},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"every_strength": float("nan")},
    ):
        if change.keys() <= set(raw.argument_names(op)):
            with pytest.raises(
                RuntimeError, match=r"(modulation|scale|every_strength) must .+, got "
            ):
                raw.call(op, {**good, **change})


@needs_cpu_kernels
def test_a_raw_call_refuses_a_wide_head() -> None:
    wide = torch.randn(B, H, M, 257)
    good = {
        **raw_arguments(),
        "q": wide,
        "k": wide,
        "v": wide,
        "k_regions": torch.ones(M, dtype=torch.int32),
    }
    with pytest.raises(RuntimeError, match="q must have a head dim of 1 to 256, got 257"):
        raw.call(raw.FWD, good)


@needs_cpu_kernels
def test_saved_tensors_from_elsewhere_never_harm() -> None:
    """Numbers that no forward call wrote: results are anyone's guess, reads stay inside."""
    good = raw_arguments()
    saved = [
        name
        for name in raw.argument_names(raw.BWD)
        if name in ("out", "lse", "stats", "row_max", "row_min")
    ]
    for value in (torch.nan, torch.inf, -torch.inf, -1.0, 1e30, 3e9, float(N)):
        raw.call(raw.BWD, {**good, **{name: torch.full_like(good[name], value) for name in saved}})


@pytest.mark.parametrize("op", OPS)
def test_none_beside_a_meta_tensor_is_refused(op: str) -> None:
    """Fake kernels run then, where torch hands None through in the place of a tensor."""
    arguments = raw_arguments()
    meta = {"k_regions": arguments["k_regions"].to("meta")}
    for name in ("q", "v", "q_regions"):
        with pytest.raises(RuntimeError, match=f"{name} must be a tensor, got None"):
            raw.call(op, {**arguments, **meta, name: None})


@needs_cpu_kernels
def test_what_is_not_asked_for_is_empty() -> None:
    """And the rest is what it is with all of it."""
    good = raw_arguments()
    results = raw.call(raw.FWD, good)
    for with_lse, with_stats in ((False, True), (True, False), (False, False)):
        asked = (True, with_lse, with_stats)
        found = raw.call(raw.FWD, good | {"with_lse": with_lse, "with_stats": with_stats})
        for x, expected, wanted in zip(found, results, asked, strict=True):
            assert torch.equal(x, expected if wanted else expected.new_empty(0))


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_strength_of_every_row_is_that_of_a_tensor(dtype: torch.dtype) -> None:
    floats = raw_arguments()
    good = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in floats.items()
    }
    spread = good | {"strength": torch.full(ROWS, 0.3, dtype=dtype)}
    every = good | {"strength": None, "every_strength": 0.3}
    for op in (raw.FWD, raw.BWD):
        for x, expected in zip(raw.call(op, every), raw.call(op, spread), strict=True):
            assert torch.equal(x, expected)
