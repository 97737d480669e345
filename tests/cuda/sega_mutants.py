"""Barriers taken out of CUDA's kernels of semantic guidance, one at a time; run by test_sega
with the emulated library.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from cuda.launch import Fault, Runtime, emulated, ptx_of
from cuda.plugin import RUNTIME
from placed import same
from ptx import Module
from ptx.module import ORDERS
from ptx.mutations import mutants
from torch import Tensor

from dense_attn._backends import cuda


def guidance(num_values: int) -> tuple[Tensor, ...]:
    uncond, text, momentum = torch.randn(3, 1, 2, num_values).half()
    lists = {
        "edit_guidance_scale": [5.0, -3.0, 0.7],
        "edit_threshold": [0.9, 0.37, 0.95],
        "weights": [1.0, 2.0, 0.5],
        "partials": [0.0, 0.5, 0.0],
        "reverse": [False, True, False],
    }
    numbers = {"guidance_scale": 7.5, "edit_momentum_scale": 0.3, "edit_mom_beta": 0.4}
    return cuda.sega_guidance(
        *(uncond, text, torch.randn(3, 1, 2, num_values).half(), momentum.float()),
        **lists,
        **numbers,
        all_warm=True,
        user_mask=None,
        sum_channels=False,
    )


CALLS = {  # a kernel, and a call that launches it
    "whole_rows_kernelI14PercentileRowsIf": lambda: cuda.percentile_mask(torch.randn(2, 1100), 0.9),
    "whole_rows_kernelI8SegaRowsI6__halfLb0": lambda: guidance(1100),
    "digits_kernelI14PercentileRowsIf": lambda: cuda.percentile_mask(torch.randn(1, 16_500), 0.9),
    "finish_kernelI8SegaRowsI6__halfLb0": lambda: guidance(16_500),
}


def alone(text: str, kernel: str) -> str:
    """A PTX text without other kernels."""
    entry = re.compile(r"^\s*(?:\.visible|\.weak)?\s*\.entry\s+(\S+?)\(.*?^}\n", re.M | re.S)
    return entry.sub(lambda found: found[0] if kernel in found[1] else "", text)


def results(call: Callable, order: str) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    with emulated(RUNTIME, order):
        return call()


def texts(call: Callable, kernel: str) -> list[str]:
    """The PTX of a kernel that a call launches."""
    found = []

    def note(runtime: Runtime, launch: object) -> Module:
        if kernel in launch.kernel.decode():
            found.append(alone(ptx_of(launch.image), kernel))
        return module(runtime, launch)

    module = Runtime.module
    with mock.patch.object(Runtime, "module", note):
        results(call, ORDERS[0])
    return found[:1]


@pytest.mark.parametrize("kernel", CALLS)
def test_every_barrier_is_needed(kernel: str) -> None:
    call = CALLS[kernel]
    expected, (text,) = results(call, ORDERS[0]), texts(call, kernel)
    barriers = [x for x in mutants(text) if x.kind == "barrier"]
    assert barriers
    module = Runtime.module

    def finds(ptx: str) -> bool:
        broken = Module(ptx)

        def chosen(runtime: Runtime, launch: object) -> Module:
            its = kernel in launch.kernel.decode()
            return broken if its else module(runtime, launch)

        with mock.patch.object(Runtime, "module", chosen):
            for order in ORDERS:
                try:
                    same(results(call, order), expected)
                except (Fault, RuntimeError, AssertionError):
                    return True
        return False

    assert not finds(text)
    kept = [mutant.line for mutant in barriers if not finds(mutant.text)]
    print(f"{kernel}: {len(barriers) - len(kept)} of {len(barriers)} barriers found")
    assert kept == []
