"""Which step of which run a call of the denoiser belongs to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Steps:
    """Follows a pipeline by its scheduler: any scheduler, any number of steps, from any start.

    The scheduler's timesteps are read once a run, which is the one wait for a GPU; then calls are counted.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.index = 0  # of the step in this run
        self.total = 0  # steps of this run
        self.repeated = False  # whether a call of the same step came before
        self.times: list[float] = []  # of all steps, 1 at pure noise
        self._timesteps: Tensor | None = None
        self._scheduler_index: int | None = None

    def follow(self, timestep: Tensor | float, unit: float = 1.0) -> bool:
        """Take one call's timestep, which counts in units of the scheduler's; whether a run begins."""
        scheduler = self.pipe.scheduler
        index = getattr(scheduler, "step_index", None)
        # Schedulers that count their steps tell the calls of one step; with the others every call is a step.
        same = hasattr(scheduler, "step_index") and index == self._scheduler_index
        begins = scheduler.timesteps is not self._timesteps or (self.index + 1 >= len(self.times) and not same)
        self.repeated = same and not begins
        self._scheduler_index = index
        if begins:
            self._begin(timestep, unit)
        elif not self.repeated:
            self.index += 1
        return begins

    @property
    def time(self) -> float:
        """1 at pure noise, 0 at the image: the timestep's part of the training's, or a flow model's sigma."""
        return self.times[self.index]

    def _begin(self, timestep: Tensor | float, unit: float) -> None:
        self._timesteps = self.pipe.scheduler.timesteps
        schedule = self._timesteps.to("cpu", torch.float64)
        given = torch.as_tensor(timestep, dtype=torch.float64, device="cpu").flatten()[0] / unit
        first = int((schedule - given).abs().argmin())  # images to start from skip the first steps
        span = self.pipe.scheduler.config.num_train_timesteps
        if schedule.max() <= 2:  # what this scheduler counts in is no timestep: its steps are taken as even
            schedule = torch.linspace(span, 0, len(schedule) + 1, dtype=torch.float64, device="cpu")[:-1]
        self.times = [min(max(t / span, 0.0), 1.0) for t in schedule[first:].tolist()]
        self.index, self.total = 0, min(getattr(self.pipe, "num_timesteps", None) or len(self.times), len(self.times))
