"""A row's way to its numbers: a contender's check, its memory, its time beside its partner."""

from __future__ import annotations

import gc
import statistics
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

import pytest
import torch
from torch import Tensor

from dense_attn._backends import table
from dense_attn.verify.accuracy import judge

from . import machine
from .clocks import Trial, clock, timed

Row = dict[str, Any]
Key = TypeVar("Key")
Result = TypeVar("Result")
OURS = "dense_attn"
BY_BACKEND = {"dense_attn-triton": "triton", "dense_attn-cuda": "cuda"}  # by no other
_BASELINE_SLACK = 4  # wrong maths is off by far more


def by_backend(ours: Callable[..., Result]) -> dict[str, Callable[..., Result]]:
    """The library's way with each of a GPU's backends named, as contenders."""
    return {name: partial(ours, backend=backend) for name, backend in BY_BACKEND.items()}


def of_here(contenders: Collection[str], of_a_gpu: Collection[str]) -> Collection[str]:
    """The contenders of the machine that is measured."""
    return of_a_gpu if machine.on_gpu() else contenders


@dataclass(frozen=True)
class Setting:
    """The computation that everything that is compared shares."""

    workload: str
    passes: str
    dtype: str

    def __str__(self) -> str:
        return f"{self.workload}-{self.passes}-{self.dtype}"


@dataclass(frozen=True)
class Entry:
    """One row to be measured: a contender in a setting."""

    setting: Setting
    contender: str

    def __str__(self) -> str:
        return f"{self.setting}-{self.contender}"

    @property
    def ours(self) -> bool:
        """One of the library's own ways, whose rounding is the library's to promise."""
        return self.contender.startswith(OURS)

    @property
    def asked(self) -> str:
        """The backend that a call of the library's is to name."""
        return BY_BACKEND.get(self.contender, "auto")

    def describe(self, family: str, shape: Iterable[int], op: str) -> Row:
        """A row's setting, before there are numbers; with the reason where its backend is not."""
        setting, probe = self.setting, torch.empty(0, device=machine.current().device)
        named = BY_BACKEND.get(self.contender)
        reasons = table.why_not(named, op, probe) if named else []
        return {
            "family": family,
            "workload": setting.workload,
            "contender": self.contender,
            "backend": named or (table.resolve("auto", op, probe) if self.ours else None),
            "pass": setting.passes,
            "dtype": setting.dtype,
            "shape": list(shape),
            **({"reason": "; ".join(reasons)} if reasons else {}),
        }


class Latest(Generic[Key, Result]):
    """Remembers what was made for the newest key alone; the older goes before the new is made."""

    _all: ClassVar[list[Latest]] = []

    def __init__(self, make: Callable[[Key], Result]) -> None:
        self._make = make
        self._kept: dict[Key, Result] = {}
        self._all.append(self)

    def __call__(self, key: Key) -> Result:
        if key not in self._kept:
            self._kept.clear()
            gc.collect()  # calls that are kept refer back to the inputs they are kept with
            self._kept[key] = self._make(key)
        return self._kept[key]

    @classmethod
    def forget_all(cls) -> None:
        for latest in cls._all:
            latest._kept.clear()
        gc.collect()


def wanted(
    entries: Iterable[Entry],
    quick: bool,
    names: list[str] | None,
    is_quick: Callable[[Entry], bool],
) -> Iterator[Entry]:
    """The entries of the workloads named, of all without names; those of a quick run, if asked."""
    for entry in entries:
        if (not names or entry.setting.workload in names) and (not quick or is_quick(entry)):
            yield entry


def tried(
    first: Callable[[], list[Tensor]],
    check: Callable[[list[Tensor]], tuple[float, float]],
    again: Callable[[], list[Tensor]] | None = None,
    in_graph: bool = True,
) -> Trial:
    """Check what the first call gives, then take time and memory roughly.

    `again`, if it differs, is what is timed.
    """
    here = machine.current()
    (peak, got), seconds = timed(lambda: here.peak_extra_bytes(first))
    error, allowed = check(got)
    size = sum(x.nbytes for x in got)
    del got
    again = again or first
    # A first call loads code, and on a GPU compiles it.
    if not here.dry_run and (seconds < 2 or machine.on_gpu()):
        (peak, _), seconds = timed(lambda: here.peak_extra_bytes(again))
    extra = None if peak is None else max(0, peak - size)
    return Trial(again, seconds, extra, error, allowed, in_graph)


def worst(
    got: Iterable[Tensor], exact: Iterable[Tensor], plain: Iterable[Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """(error, allowed) of the result that uses up most of what the library's rule allows."""
    verdicts = [judge(*results, dtype) for results in zip(got, exact, plain)]
    return max(verdicts, key=lambda verdict: verdict[0] / max(verdict[1], 1e-300))


def measure(
    row: Row, contender: Callable[[], Trial], partner: Callable[[], Trial], benchmark: Any
) -> Row:
    """The row with its numbers: the machine's clock times the contender, whose partner runs before
    each round.

    The partner is this library, or another contender for the library's own row, so `ratio`, the
    median over rounds of (time of the contender / time of the library), compares neighbours in
    time. Who fails costs its own row alone.
    """
    ours = row["contender"].startswith(OURS)
    other = attempted(partner)
    trial = attempted(contender)
    if isinstance(trial, Failure):
        return row | trial.told(ours)
    row = row | {"error": trial.error, "allowed": trial.allowed}
    if not right(trial, ours):
        reason = f"error {trial.error:.2g} where {trial.allowed:.2g} is allowed"
        return row | {"reason": reason, "wrong": True}
    beside = other if isinstance(other, Trial) else None
    rounds = attempted(lambda: clock(benchmark).compare(trial, beside))
    if rounds is None:  # --benchmark-disable
        return row | {"reason": "timing is switched off"}
    if isinstance(rounds, Failure):
        return row | rounds.told(ours)
    row |= spread("seconds", rounds.times)
    row |= {"rounds": len(rounds.times), "peak_extra_bytes": trial.peak_extra_bytes}
    if row["contender"] != OURS and beside is not None and right(beside, True):
        row |= spread("ratio", rounds.ratios)
    return row | rounds.notes


@dataclass(frozen=True)
class Failure:
    """The error that a contender raised."""

    reason: str
    traceback: str

    def told(self, ours: bool) -> Row:
        """Its part of a row: the library's is a mistake, a baseline's one of its limits."""
        mistake = {"wrong": True, "traceback": self.traceback} if ours else {}
        return {"reason": self.reason} | mistake


def attempted(call: Callable[[], Result]) -> Result | Failure:
    """The result of a call, or how it failed, its memory given back for the next row."""
    try:
        return call()
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        failure = Failure(f"{type(error).__name__}: {lines[0]}", traceback.format_exc())
    gc.collect()
    machine.current().release()
    return failure


def right(trial: Trial, ours: bool) -> bool:
    """Whether the library keeps its rule, or a baseline, which rounds as it likes, its function."""
    return trial.error <= trial.allowed * (1 if ours else _BASELINE_SLACK)


def report(
    entry: object, row: Row, record_property: Callable[[str, object], None], benchmark: Any = None
) -> None:
    """Hand a row to pytest: a wrong one fails, one without numbers is skipped with its reason."""
    if benchmark is not None:
        benchmark.group = str(entry).removesuffix(f"-{row['contender']}")
        benchmark.extra_info.update(row)
    record_property("row", row)
    if "wrong" in row:
        pytest.fail(row["reason"])
    if "reason" in row:
        pytest.skip(row["reason"])


def spread(name: str, values: list[float]) -> dict[str, float | None]:
    """Median and interquartile range, None for fewer than three values."""
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 2 else None
    return {
        name: statistics.median(values),
        f"{name}_iqr": quartiles and quartiles[2] - quartiles[0],
    }
