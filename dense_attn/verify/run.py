"""The tables of `python -m dense_attn verify`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

from dense_attn._backends import choice, table
from dense_attn._command import UserError

from . import layout_attention, reversible, sega
from .accuracy import Verdict, why_not

EMULATOR = Path(__file__).resolve().parents[2] / "tests" / "support" / "ptx"  # of a checkout


def main(backends: Sequence[str] | None = None) -> int:
    """Check these backends, or all, and print the tables; 1 where a row failed."""
    backends = table.ORDER if backends is None else backends
    for backend in backends:
        reasons = why_not(backend, "layout_attention", torch.float16)
        if reasons and (backend == "triton" or table.missing(backend, "layout_attention") is None):
            emulates = backend == "triton" and EMULATOR.is_dir()
            hint = "; --emulated checks its kernels as compiled" if emulates else ""
            print(f"{backend}: not checked, {'; '.join(reasons)}{hint}")
        for given in () if reasons else layout_attention.calls():
            if refused := layout_attention.refused(backend, given.cast(torch.float16)):
                print(f"{backend}: {given.name} of layout_attention not checked, {refused}")
    verdicts = [*_attention(backends), *_others(backends)]
    failed = sum(not verdict.passed for verdict in verdicts)
    print("\n" + (f"{failed} rows FAILED" if failed else "every row passed"))
    _remember(verdicts)
    return 1 if failed else 0


def _remember(verdicts: Sequence[Verdict]) -> None:
    """Keep for "auto" which backends are right on this GPU."""
    for backend in sorted({verdict.backend for verdict in verdicts}):
        if table.device_of(backend) == "cuda":
            passed = all(one.passed for one in verdicts if one.backend == backend)
            gpu = torch.cuda.get_device_name()
            choice.remember(backend, gpu, passed)
            print(f"remembered: {backend} {'is right' if passed else 'FAILED'} on {gpu}")


def emulated(target: str) -> int:
    """Check the Triton kernels as compiled for a target, by the emulator that tests have.

    A process of its own: the backend takes tensors of the CPU only where it is loaded for that.
    """
    if not EMULATOR.is_dir():
        raise UserError(
            "--emulated must run in a checkout, whose tests hold the emulator, got an installation "
            "without tests: the compiled Triton kernels are not checked"
        )
    if find_spec("triton") is None:
        raise UserError("--emulated must find Triton, got none: pip install dense_attn[triton]")
    return subprocess.run([sys.executable, str(EMULATOR), target], check=False).returncode


def _attention(backends: Sequence[str]) -> list[Verdict]:
    """A column for each result of the calls."""
    rule = "allowed = 2*max|plain - exact| + eps*max|exact|; right when <= 1"
    print(f"error / allowed, worst of all cases; {rule}")
    print("flipped: the same for an output with one region bit flipped; the check works when > 1\n")
    columns = (*layout_attention.RESULTS, "flipped")
    names = " ".join(f"{name:>9}" for name in columns)
    print(f"{'backend':<10} {'dtype':<9} {'modulation':<10} {names}")
    verdicts = []
    for verdict in layout_attention.verify(backends):
        numbers = (*verdict.numbers.values(), verdict.control)
        shown = " ".join(f"{number:9.2g}" for number in numbers)
        print(f"{_name(verdict)} {verdict.what:<10} {shown}", end="")
        print("" if verdict.passed else f"  FAILED ({verdict.worst})", flush=True)
        verdicts.append(verdict)
    return verdicts


def _others(backends: Sequence[str]) -> list[Verdict]:
    """The other families' rows, numbers with their names."""
    rule = "error / allowed, right when <= 1"
    print(f"\nbits: how many elements differ, right when 0; the rest: {rule}")
    wrong = "a result that is wrong on purpose"
    print(f"control: the same for {wrong}; the check works when it fails\n")
    verdicts = []
    for family in (sega, reversible):
        for verdict in family.verify(backends):
            shown = ", ".join(f"{name} {number:.2g}" for name, number in verdict.numbers.items())
            print(
                f"{_name(verdict)} {verdict.what:<18} {shown}; control {verdict.control:.2g}",
                end="",
            )
            print("" if verdict.passed else "  FAILED", flush=True)
            verdicts.append(verdict)
    return verdicts


def _name(verdict: Verdict) -> str:
    return f"{verdict.backend:<10} {verdict.dtype:<9}"
