"""The tables of `python -m dense_attn verify`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from math import nan
from pathlib import Path

import torch

from dense_attn._backends import choice, table
from dense_attn._command import UserError

from . import calls, layout_attention, reversible, sega
from .accuracy import Verdict, why_not

EMULATOR = Path(__file__).resolve().parents[2] / "tests" / "support" / "ptx"  # of a checkout


def main(backends: Sequence[str] | None = None) -> int:
    """Check these backends, or all, and print the tables; 1 where a row failed."""
    backends = table.ORDER if backends is None else backends
    given = [*calls.calls(), *calls.kernel_calls(backends)]
    for backend in backends:
        _name_what_is_left_out(backend, given)
    verdicts = [*_attention(backends, given), *_others(backends)]
    lost = _lost(verdicts)
    verdicts = [verdict for verdict in verdicts if verdict.backend not in lost]
    failed = sum(not verdict.passed for verdict in verdicts)
    print("\n" + (f"{failed} rows FAILED" if failed else "every row passed"), flush=True)
    _remember(verdicts)
    for backend in lost:
        _check_apart(backend)
    return 1 if failed else 0


def _name_what_is_left_out(backend: str, given: Sequence[calls.AttentionCall]) -> None:
    """The reasons why a backend is not checked, or not on some of the calls."""
    reasons = why_not(backend, "layout_attention", torch.float16)
    if reasons and (backend == "triton" or table.missing(backend, "layout_attention") is None):
        emulates = backend == "triton" and EMULATOR.is_dir()
        hint = "; --emulated checks its kernels as compiled" if emulates else ""
        print(f"{backend}: not checked, {'; '.join(reasons)}{hint}")
    for one in () if reasons else given:
        if refused := layout_attention.refused(backend, one, torch.float16):
            print(f"{backend}: {one.name} of layout_attention not checked, {refused}")


def _lost(verdicts: Sequence[Verdict]) -> list[str]:
    """The backends of a GPU on whom nothing is known, since another one's fault has left it
    unusable to this process.
    """
    here = [x for x in verdicts if table.device_of(x.backend) == "cuda"]
    faults = [x.backend for x in here if x.error]
    if not faults:
        return []
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return sorted({x.backend for x in here} - {faults[0]})
    return []


def _check_apart(backend: str) -> None:
    """Check a backend in a process of its own, which prints and remembers what it finds."""
    print(f"\n{backend} again, in a process of its own: the GPU is lost to this one\n", flush=True)
    command = [sys.executable, "-m", "dense_attn", "verify", f"--backend={backend}"]
    subprocess.run(command, check=False)


def _remember(verdicts: Sequence[Verdict]) -> None:
    """Keep for "auto" which backends failed on this GPU, and which are right in all their ops."""
    for backend in sorted({verdict.backend for verdict in verdicts}):
        if table.device_of(backend) == "cuda":
            passed = all(one.passed for one in verdicts if one.backend == backend)
            if passed and _left_out(backend):
                continue
            gpu = torch.cuda.get_device_name()
            choice.remember(backend, gpu, passed)
            print(f"remembered: {backend} {'is right' if passed else 'FAILED'} on {gpu}")


def _left_out(backend: str) -> list[str]:
    """The ops that a backend has and could not be asked for."""
    ops = [op for op in table.OPS if table.missing(backend, op) is None]
    return [op for op in ops if why_not(backend, op, torch.float16)]


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


def _attention(backends: Sequence[str], given: Sequence[calls.AttentionCall]) -> list[Verdict]:
    """A column for each result of the calls."""
    rule = "allowed = 2*max|plain - exact| + eps*max|exact|; right when <= 1"
    print(f"error / allowed, worst of all cases; {rule}")
    print("flipped: the same for an output with one region bit flipped; the check works when > 1\n")
    columns = (*calls.RESULTS, "flipped")
    names = " ".join(f"{name:>9}" for name in columns)
    print(f"{'backend':<10} {'dtype':<9} {'modulation':<10} {names}")
    verdicts = []
    for verdict in layout_attention.verify(backends, given):
        numbers = (*(verdict.numbers.get(name, nan) for name in calls.RESULTS), verdict.control)
        shown = " ".join(f"{number:9.2g}" for number in numbers)
        print(f"{_name(verdict)} {verdict.what:<10} {shown}", end="")
        print("" if verdict.passed else f"  FAILED ({verdict.fault})", flush=True)
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
            numbers = [f"{name} {number:.2g}" for name, number in verdict.numbers.items()]
            shown = f"{', '.join(numbers)}; control {verdict.control:.2g}" if numbers else ""
            print(f"{_name(verdict)} {verdict.what:<18} {shown}", end="")
            fault = f" ({verdict.fault})" if verdict.fault else ""
            print("" if verdict.passed else f"  FAILED{fault}", flush=True)
            verdicts.append(verdict)
    return verdicts


def _name(verdict: Verdict) -> str:
    return f"{verdict.backend:<10} {verdict.dtype:<9}"
