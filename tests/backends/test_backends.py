"""Every op x backend x dtype x case against the float64 reference; skips name their reason."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import partial

import pytest
import torch
from accuracy import assert_accurate, evaluate, exact_and_plain
from cases import (
    CASES,
    DEVICES,
    DTYPES,
    HALVED,
    INTERPRETED,
    MODULATIONS,
    SPLIT,
    Case,
    Inputs,
    backends,
    make_inputs,
    moved,
    why_skip,
)
from torch import Tensor

from dense_attn import _checks, layout_attention
from dense_attn._backends import contract, cuda, table

KERNELS = backends("cpu", "triton", "cuda", dtypes=DTYPES)
# Keys that Triton's kernels take as one tile, of exact float32 on a GPU.
ROW_KEYS, FLOAT32_ROW_KEYS = 128, 32
# Cases whose heads the warp-specialised kernel takes, and branches of it.
SPECIALISED = (
    *("head-dim-40", "ordered-in-runs", "ordered-per-sample", "every-other-token", "negated"),
    *("some-rows-in-no-region", "bit-31", "strength-1.0", "strength-1.8", "strength--0.5"),
    *("equal-scores", "low-unmatched", "nan-in-q", "nan-in-k", "inf-in-q", "inf-in-k"),
    *("wide-in-runs", "strength-0.0", "strength-on-half-the-batch", "ordered-without-strength"),
    *("strengths-in-whole-tiles", "no-numbers-in-whole-tiles"),
)
EMULATED = DEVICES["triton"] == "cpu" and not INTERPRETED
pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings(  # numpy's, interpreted
        "ignore:(invalid value|overflow) encountered:RuntimeWarning"
    ),
]


# In the interpreter a case costs seconds: those that reach a branch of the kernels, most with the
# most general rule.
INTERPRETED_IN_FULL = ("ordered", "cross-attention", "ordered-in-runs")
HALF_TOO = ("head-dim-40", "head-dim-80", "head-dim-160", "ordered-in-runs", "cross-attention")
INTERPRETED_ONCE = (
    *(f"head-dim-{d}" for d in (1, 40, 41, 80, 128, 160, 256)),
    *(
        "one-query",
        "one-by-one-range",
        "one-key",
        "full-tiles",
        "two-keys",
        "no-keys",
        "no-queries",
        "no-batch",
    ),
    *(
        "transposed",
        "every-other-token",
        "unaligned",
        "sliding-windows",
        "negated",
        "broadcast-heads",
    ),
    *(
        "words-per-sample",
        "words-strided",
        "all-matched",
        "none-matched",
        "some-rows-in-no-region",
        "32-regions",
    ),
    *(
        "bit-31",
        "strength-1.0",
        "strength-1.8",
        "strength--0.5",
        "strength-full",
        "equal-scores",
        "ties",
    ),
    *(
        "large-scores",
        "low-scores",
        "nan-in-q",
        "nan-in-k",
        "inf-in-q",
        "inf-in-k",
        "scale",
        "ordered-per-sample",
    ),
    *("keys-counted", "keys-counted-in-runs", "keys-anywhere", "keys-anywhere-in-runs"),
    *("groups-of-3", "one-group-of-8", "groups-of-some-keys"),
    *("gradient-of-out-alone", "gradient-of-lse-alone", "gradient-of-a-sum", "ties-across-tiles"),
)
INTERPRETED_LATER = [
    case
    for case in CASES
    if case.name not in (*INTERPRETED_ONCE, *INTERPRETED_IN_FULL)
    and not case.name.startswith("many-keys")  # for strips of the CPU's
]


def calls() -> list:
    """The product backend x dtype x form x case x modulation; what is not here stands once, skipped
    with its reason.
    """
    params = []
    for backend in KERNELS:
        (name,), marks = backend.values, backend.marks
        for dtype in DTYPES:
            reason = why_skip(name, dtype=dtype)
            if reason is not None:
                gone = f"{name}-{_checks.name(dtype)}"
                marks_here = [
                    *(mark for mark in marks if mark.name == "gpu"),
                    pytest.mark.skip(reason),
                ]
                params.append(
                    pytest.param(name, dtype, "", CASES[0], "range", marks=marks_here, id=gone)
                )
                continue
            for case, modulation in itertools.product(CASES, MODULATIONS):
                if dtype not in case.dtypes or modulation not in _modulations(name, dtype, case):
                    continue
                core = [pytest.mark.core] * case.core
                if refused := _refused(name, dtype, case):
                    core = [pytest.mark.skip(refused)]
                for form in _forms(name, dtype, case):
                    call = "-".join(
                        filter(None, (name, form, case.name, _checks.name(dtype), modulation))
                    )
                    params.append(
                        pytest.param(
                            name, dtype, form, case, modulation, marks=(*marks, *core), id=call
                        )
                    )
    return params


def _refused(backend: str, dtype: torch.dtype, case: Case) -> str:
    """The table's reasons why a backend cannot run a case; empty if it can."""
    q = torch.empty(1, case.size[4], dtype=dtype, device=DEVICES[backend])
    return "; ".join(table.why_not(backend, "layout_attention", q))


def _modulations(backend: str, dtype: torch.dtype, case: Case) -> tuple[str, ...]:
    half = dtype != torch.float32
    if (
        backend != "triton"
        or not INTERPRETED
        or case.name in INTERPRETED_IN_FULL[: 1 if half else None]
    ):
        return case.modulations
    once = (*INTERPRETED_ONCE, *INTERPRETED_IN_FULL)
    return (
        case.modulations[:1]
        if case.name in once and (not half or case.name.startswith(HALF_TOO))
        else ()
    )


def _forms(backend: str, dtype: torch.dtype, case: Case) -> tuple[str, ...]:
    """The forms of a call of Triton's kernels: a row at once, or two phases, at times parked, by
    specialised warps, in half tiles or with two or four programs a tile of keys; of CUDA's, where
    Triton's make the gradient: with theirs, and with its own.
    """
    if backend == "cuda" and cuda.gradient_of_attention() == "triton":
        return ("", "own-gradient")
    if backend != "triton":
        return ("",)
    most = ROW_KEYS if dtype != torch.float32 or INTERPRETED else FLOAT32_ROW_KEYS
    row = ("row",) * (case.size[3] <= most)
    forms = (*row, "phases", *("parked",) * (case.name in ("head-dim-80", "head-dim-128")))
    if case.name in SPECIALISED and (INTERPRETED or dtype != torch.float32):
        forms += ("specialised",)
    if case.name in HALVED and EMULATED and dtype != torch.float32:
        forms += ("halved",)
    if INTERPRETED and case.name in INTERPRETED_ONCE and not case.name.startswith("head-dim"):
        forms = forms[INTERPRETED_ONCE.index(case.name) % len(forms) :][:1]  # either, in turns
    if case.name in SPLIT and dtype == (torch.float32 if INTERPRETED else torch.bfloat16):
        forms += ("split-2", "split-4")
    return forms


def _use(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the calls of a test take a form."""
    if form == "own-gradient":
        monkeypatch.setattr(cuda, "_multiplies_by_warp_groups", lambda device: False)
    if form.startswith("split"):
        from dense_attn.triton_kernels import configs

        splits = int(form[-1])
        monkeypatch.setattr(configs, "splitting", lambda table, *_: replace(table, splits=splits))
    if form in ("phases", "parked", "specialised", "halved"):
        from dense_attn.triton_kernels import configs

        if form in ("specialised", "halved"):  # of few tiles an idle processor takes half
            monkeypatch.setattr(configs, "PACKED_KEYS", 0)
            busy = 1 if form == "specialised" else 1 << 20
            monkeypatch.setattr(configs, "processors", lambda device: busy)
        if form == "specialised":
            interpreted = replace(configs.INTERPRETED, specialised=True)
            monkeypatch.setattr(configs, "INTERPRETED", interpreted)
        choose = configs.layout_attention_fwd
        parks = form == "parked"
        monkeypatch.setattr(configs, "ROW_KEYS", 0)
        monkeypatch.setattr(configs, "FLOAT32_ROW_KEYS", 0)
        monkeypatch.setattr(
            configs,
            "layout_attention_fwd",
            lambda *call: replace(choose(*call), parks=parks or choose(*call).parks),
        )


def run(backend: str, modulation: str, case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """Results and gradients of the public op on the backend's device, on the CPU."""
    there = moved(inputs, DEVICES[backend])
    options = {
        "modulation": modulation,
        "scale": case.scale,
        "return_lse": True,
        "backend": backend,
        "k_mask": there.k_mask,
        **there.orders,
    }
    results = evaluate(partial(layout_attention, **options), there, case.through)
    return {name: result.cpu() for name, result in results.items()}


@pytest.mark.parametrize(("backend", "dtype", "form", "case", "modulation"), calls())
def test_accuracy(
    backend: str,
    dtype: torch.dtype,
    form: str,
    case: Case,
    modulation: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _use(form, monkeypatch)
    inputs = make_inputs(case, dtype)
    exact, plain = exact_and_plain(inputs, case.through, modulation=modulation, scale=case.scale)
    results = run(backend, modulation, case, inputs)
    assert results.keys() == exact.keys()
    # How a row of no numbers is summed up is each kernel's own affair; that it is none is not.
    if case.through == "none" or case.values == "no-numbers":
        results["lse"], exact["lse"] = (
            torch.where(x.isfinite(), x, torch.nan) for x in (results["lse"], exact["lse"])
        )
    for name, result in results.items():
        assert_accurate(name, result, exact[name], plain[name], dtype)


@pytest.mark.full
@pytest.mark.skipif(not INTERPRETED, reason="among the others")
@pytest.mark.parametrize("case", INTERPRETED_LATER, ids=lambda case: case.name)
def test_accuracy_of_other_cases_by_triton(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once through the interpreter, in either form in turns."""
    forms = _forms("triton", torch.float32, case)
    form = forms[INTERPRETED_LATER.index(case) % len(forms)]
    test_accuracy("triton", torch.float32, form, case, case.modulations[0], monkeypatch)


@pytest.mark.parametrize("modulation", ["range", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_checks.name)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_flipped_region_bit_is_rejected(
    backend: str, dtype: torch.dtype, modulation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control: the rule must be able to fail, for every result it judges."""
    if why_skip(backend, dtype=dtype):
        pytest.skip(why_skip(backend, dtype=dtype))
    case = Case("flipped-bit", words="runs", strength=0.8)
    inputs = make_inputs(case, dtype)
    exact, plain = exact_and_plain(inputs, modulation=modulation)
    flipped = replace(inputs, q_regions=inputs.q_regions.clone())
    flipped.q_regions[7] ^= 1
    for form in _forms(backend, dtype, case):
        _use(form, monkeypatch)
        for name, result in run(backend, modulation, case, flipped).items():
            if modulation == "range" and name in ("dq", "dk") and dtype == torch.bfloat16:
                # plain bfloat16 finds a row's extreme at another key, an error as large as one
                # bit's
                continue
            with pytest.raises(AssertionError, match=f"{name} is off by"):
                assert_accurate(name, result, exact[name], plain[name], dtype)


def test_every_modulation_is_among_the_cases() -> None:
    assert MODULATIONS == contract.MODULATIONS
