"""Every op x backend x dtype x case against the reference in float64; a skip prints the table's own reason."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from accuracy import assert_accurate, evaluate, exact_and_plain
from cases import CASES, DTYPES, MODULATIONS, Case, Inputs, backends, make_inputs, why_skip

from dense_attn import _checks, layout_attention

ISAS = ("avx512_bf16", "avx512", "avx2", "portable")
KERNELS = backends("cpu", "triton", "cuda")
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def calls() -> list:
    """The product backend x dtype x case x modulation; a backend that is not here stands once, skipped."""
    params = []
    for backend in KERNELS:
        (name,), marks = backend.values, backend.marks
        if why_skip(name):
            params.append(pytest.param(name, DTYPES[0], CASES[0], "range", marks=marks, id=name))
            continue
        for case in CASES:
            for dtype, modulation in itertools.product(case.dtypes, case.modulations):
                call = "-".join((name, case.name, _checks.name(dtype), modulation))
                core = [pytest.mark.core] * case.core
                params.append(pytest.param(name, dtype, case, modulation, marks=(*marks, *core), id=call))
    return params


def kernel(backend: str, modulation: str, case: Case, inputs: Inputs) -> Callable:
    return partial(
        layout_attention, modulation=modulation, scale=case.scale, return_lse=True, backend=backend, **inputs.orders
    )


@pytest.mark.parametrize(("backend", "dtype", "case", "modulation"), calls())
def test_accuracy(backend: str, dtype: torch.dtype, case: Case, modulation: str) -> None:
    inputs = make_inputs(case, dtype)
    exact, plain = exact_and_plain(inputs, case.through, modulation=modulation, scale=case.scale)
    results = evaluate(kernel(backend, modulation, case, inputs), inputs, case.through)
    assert results.keys() == exact.keys()
    if (
        case.through == "none"
    ):  # how a row of no numbers is summed up is each kernel's own affair; that it is none is not
        results["lse"], exact["lse"] = (torch.where(x.isfinite(), x, torch.nan) for x in (results["lse"], exact["lse"]))
    for name, result in results.items():
        assert_accurate(name, result, exact[name], plain[name], dtype)


@pytest.mark.parametrize("modulation", ["range", "bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=_checks.name)
@pytest.mark.parametrize("backend", KERNELS)
def test_a_flipped_region_bit_is_rejected(backend: str, dtype: torch.dtype, modulation: str) -> None:
    """The negative control: the rule must be able to fail, for every result it judges."""
    case = Case("flipped-bit", words="runs", strength=0.8)
    inputs = make_inputs(case, dtype)
    exact, plain = exact_and_plain(inputs, modulation=modulation)
    flipped = replace(inputs, q_regions=inputs.q_regions.clone())
    flipped.q_regions[7] ^= 1
    for name, result in evaluate(kernel(backend, modulation, case, flipped), flipped).items():
        if modulation == "range" and name in ("dq", "dk") and dtype == torch.bfloat16:
            continue  # plain bfloat16 finds a row's extreme at another key, an error as large as one bit's
        with pytest.raises(AssertionError, match=f"{name} is off by"):
            assert_accurate(name, result, exact[name], plain[name], dtype)


def test_every_modulation_is_among_the_cases() -> None:
    assert MODULATIONS == sys.modules["dense_attn.layout_attention"].MODULATIONS


def _run(isa: str, *command: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "DENSE_ATTN_ISA": isa}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


CALL = "import torch, dense_attn as d; x = torch.ones(1, 1, 2, 3); w = torch.ones(2, dtype=torch.int32); "
CALL += "d.layout_attention(x, x, x, w, w, backend='cpu'); print(torch.ops.dense_attn.cpu_isa())"
needs_cpu_kernels = pytest.mark.skipif(why_skip("cpu") is not None, reason=str(why_skip("cpu")))


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set(isa: str) -> None:
    """The core cases again, in a process of their own: the library reads DENSE_ATTN_ISA when it is loaded."""
    probe = _run(isa, "-c", CALL)
    if probe.returncode:
        assert isa != "portable"
        assert f"DENSE_ATTN_ISA must name an instruction set that this processor has, got {isa}" in probe.stderr
        pytest.skip(f"{isa}: not on this processor")
    assert probe.stdout.strip() == isa
    tests = _run(
        isa, "-m", "pytest", "-q", "-m", "core", "-k", "test_accuracy and cpu", "-p", "no:cacheprovider", __file__
    )
    assert tests.returncode == 0, tests.stdout[-4000:]
    assert " passed" in tests.stdout


@needs_cpu_kernels
@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2,"])
def test_an_unknown_instruction_set_is_refused(isa: str) -> None:
    probe = _run(isa, "-c", CALL)
    assert probe.returncode == 1
    assert "DENSE_ATTN_ISA must be one of avx512_bf16, avx512, avx2, portable, got " + isa in probe.stderr
