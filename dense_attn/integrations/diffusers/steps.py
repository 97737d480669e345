"""Which step of which run a call of the denoiser belongs to."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from dense_attn import _checks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Steps:
    """Follows a pipeline by its scheduler, through any number of steps and of calls in a step.

    Timesteps are read once a run, which is the one wait for a GPU, and again only where they come
    in other memory.

    Args:
        pipe: the pipeline.
        until: the sigma of a flow at which a block's steps end, where that is told.
    """

    def __init__(self, pipe: DiffusionPipeline, until: float | None = None) -> None:
        self.pipe, self.until = pipe, until
        if until is not None:
            check_flow(pipe.scheduler)
        self.index = 0  # of the step in this run
        self.total = 0  # steps of this run
        self.repeated = False  # whether a call of the same step came before
        self.times: list[float] = []  # of all steps, 1 at pure noise
        self.sigmas: list[float] = []  # at the begin of each, where `until` asks for them
        self._timesteps: Tensor | None = None  # as the scheduler had them at the last call
        self._schedule: list[float] = []  # their values
        self._first = 0  # the run's first in it
        self._last: Tensor | float = 0.0  # the last call's
        self._count: int | None = None  # the scheduler's, where it counts, at the last call

    def follow(self, timestep: Tensor | float, unit: float = 1.0) -> bool:
        """Take a call's timestep, in units of the scheduler's, and tell whether a run begins."""
        scheduler = self.pipe.scheduler
        count = getattr(scheduler, "step_index", None)
        # schedulers that count their steps tell the calls of one; with others the timestep does
        same = bool(self.times) and (
            _equal(timestep, self._last) if count is None else count == self._count
        )
        ended = self.index + 1 >= len(self.times)
        begins = self._is_new(timestep, unit, count) or (ended and not same)
        self.repeated = same and not begins
        self._timesteps, self._last, self._count = scheduler.timesteps, timestep, count
        if begins:
            self._begin(timestep, unit)
        elif not self.repeated:
            self.index += 1
        return begins

    @property
    def time(self) -> float:
        """1 at pure noise, 0 at the image: the timestep over the training's, or a flow's sigma."""
        return self.times[self.index]

    def within(self, start: float, stop: float) -> bool:
        """Whether a block acts in this step: in a part of the run, or before a sigma is reached."""
        if self.until is not None:
            return self.sigmas[self.index] > self.until
        return start * self.total <= self.index < stop * self.total

    def _is_new(self, timestep: Tensor | float, unit: float, count: int | None) -> bool:
        """Whether the timesteps were set for another run, not copied in the middle of this one."""
        timesteps = self.pipe.scheduler.timesteps
        if timesteps is self._timesteps:
            return False
        if not self.times or timesteps.tolist() != self._schedule:
            return True
        ahead = 1 if self.index == 0 else 0  # a first step that comes again is another run's
        if hasattr(self.pipe.scheduler, "step_index"):
            return count is None or (
                self._count is not None and count - self._count not in range(ahead, 2)
            )
        at = self._first + self.index
        return _value(timestep) / unit not in self._schedule[at + ahead : at + 2]

    def _begin(self, timestep: Tensor | float, unit: float) -> None:
        schedule = self.pipe.scheduler.timesteps.to("cpu", torch.float64)
        self._schedule = self.pipe.scheduler.timesteps.tolist()
        far = (schedule - _value(timestep) / unit).abs()
        self._first, told = int(far.argmin()), getattr(self.pipe.scheduler, "begin_index", None)
        if told is not None and told < len(far) and far[told] == far[self._first]:
            self._first = told  # images skip the first steps, and some schedules repeat values
        span = self.pipe.scheduler.config.num_train_timesteps
        if schedule.max() <= 2:
            # this scheduler counts in something else: its steps are taken as even
            steps = max(len(schedule) - int(schedule[-1] == 0), 1)  # SCM's last 0 is none
            schedule = torch.linspace(span, 0, steps + 1, dtype=torch.float64, device="cpu")[:-1]
        self.times = [min(max(t / span, 0.0), 1.0) for t in schedule[self._first :].tolist()]
        self.index, self.total = 0, len(self.times)
        if self.until is not None:
            check_flow(self.pipe.scheduler)
            self.sigmas = self.pipe.scheduler.sigmas.tolist()[self._first :]
            if _rise(self.sigmas):  # a subclass's
                _refuse_rising(type(self.pipe.scheduler).__name__)
        if getattr(self.pipe, "denoising_end", 0) is not None and _takes_end(self.pipe):
            self.total = min(getattr(self.pipe, "num_timesteps", None) or self.total, self.total)


def check_flow(scheduler: Any) -> None:
    """Refuse a scheduler without the sigmas of a flow, from 1 to 0."""
    from .inversion.schedules import is_flow  # which stands on modules that have steps

    if not is_flow(scheduler) or not isinstance(getattr(scheduler, "sigmas", None), Tensor):
        rule = "be None for a scheduler that is no flow's"
        _checks.refuse("active_sigma", rule, type(scheduler).__name__)
    if scheduler.config.get("invert_sigmas"):
        _refuse_rising(type(scheduler).__name__)


def check_sigmas(given: dict[str, Any]) -> None:
    """Refuse sigmas of a pipeline's call that rise, be it before a last that is 0."""
    sigmas = given.get("sigmas")
    if sigmas is None:
        return
    try:
        values = [float(sigma) for sigma in sigmas]
    except (TypeError, ValueError, RuntimeError):
        _checks.refuse("sigmas", "be a list of numbers", repr(sigmas), TypeError)
    if _rise(values):
        _refuse_rising("the call's sigmas")


def _rise(sigmas: list[float]) -> bool:
    """Whether a step ends with more noise than it begins with."""
    return any(later > sigma for sigma, later in pairwise(sigmas))


def _refuse_rising(got: str) -> NoReturn:
    """Refuse sigmas that count the image and not the noise: the first steps would be the last."""
    _checks.refuse("active_sigma", "be None for a scheduler whose sigmas rise", got)


def _takes_end(pipe: DiffusionPipeline) -> bool:
    """Whether a pipeline's call may end early; others' number of steps may be an old one."""
    return "denoising_end" in inspect.signature(type(pipe).__call__).parameters


def _value(timestep: Tensor | float) -> float:
    return float(torch.as_tensor(timestep, dtype=torch.float64, device="cpu").flatten()[0])


def _equal(a: Tensor | float, b: Tensor | float) -> bool:
    """Whether two timesteps are one; elements of a tensor are told apart by their place."""
    tensors = [x for x in (a, b) if isinstance(x, Tensor)]
    if len(tensors) == 2 and len({x.untyped_storage().data_ptr() for x in tensors}) == 1:
        return a.data_ptr() == b.data_ptr()
    return _value(a) == _value(b)
