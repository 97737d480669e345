"""A pipeline's run without its denoiser: what that would be called with in every step."""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks

from ..hooks import arguments, unwrapped

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Model

GUIDERS = "guider", "ocr_guider"  # of pipelines whose calls take no scale
ROUNDING = 2.0**-6  # of sums in bfloat16, as a share of the largest


class Ask(NamedTuple):
    """A call of a denoiser, which can be made again with other latents."""

    denoiser: torch.nn.Module
    bound: inspect.BoundArguments
    copies: int  # of the latents in its batch: of both branches, or of one
    dtype: torch.dtype  # of the latents

    def again(self, model: Model, latents: Tensor) -> Tensor:
        """The estimates of other latents, [copies * B, ...]."""
        given = self.bound.arguments | {
            model.latents: model.given(
                with_room(model, torch.cat([latents.to(self.dtype)] * self.copies))
            )
        }
        bound = inspect.BoundArguments(self.bound.signature, given)
        made = model.taken(self.denoiser(*bound.args[1:], **bound.kwargs)[0])
        return estimate(made, latents)


class Scales(NamedTuple):
    """The guidance's scale, and that of the steps of a second denoiser."""

    first: float
    second: float
    denoiser: Any = None  # the second

    def of(self, asks: list[Ask]) -> float:
        """The scale of a step of these calls."""
        return self.first if asks[0].denoiser is not self.denoiser else self.second


class Rehearsal(NamedTuple):
    """The latents that a run begins with, and the calls of each of its steps."""

    latents: Tensor
    steps: list[list[Ask]]


def with_room(model: Model, latents: Tensor) -> Tensor:
    """Latents with room for an image behind them, where a record says so."""
    if model.room is None:
        return latents
    shape = list(latents.shape)
    shape[model.room] += 1
    return torch.cat([latents, latents.new_zeros(shape)], model.room)


def estimate(made: Tensor, latents: Tensor) -> Tensor:
    """The estimate of what a denoiser made of [B, C, ...]: it may say its variance behind it."""
    doubled = made.dim() == 4 and made.shape[1] == 2 * latents.shape[1]
    return made.chunk(2, dim=1)[0] if doubled else made


def combined(model: Model, asks: list[Ask], estimates: list[Tensor], scale: float) -> Tensor:
    """The estimate that the pipeline makes of those of its branches."""
    if len(asks) == 2:
        prompt, negative = estimates
    elif asks[0].copies == 2:
        negative, prompt = estimates[0].chunk(2)
        if model.branches == "prompt first":
            negative, prompt = prompt, negative
    else:
        return model.sign * estimates[0]
    return model.sign * model.guided(negative, prompt, scale)


def rehearse(
    pipe: DiffusionPipeline, model: Model, scheduler: Any, scales: Scales, given: dict[str, Any]
) -> Rehearsal:
    """Run a copy of the pipeline, with random estimates in the place of its denoiser's.

    What the copy does with them is checked in each step: they are to be combined as the record
    says. The pipeline is as it was; the scheduler, which is to be one of its own, is changed.
    """
    run, actor = _Run(model, scheduler, scales, type(pipe).__name__), copy.copy(pipe)
    for name in GUIDERS:
        guider = copy.copy(getattr(pipe, name, None))
        if guider is not None:
            guider.guidance_scale, vars(actor)[name] = scales.first, guider
    for name in (model.component, f"{model.component}_2"):
        if getattr(pipe, name, None) is not None:
            vars(actor)[name] = _StandIn(getattr(pipe, name), run)
    scheduler.step = run.step
    vars(actor).update(scheduler=scheduler, _progress_bar_config={"disable": True})
    with torch.inference_mode(False), suppress(_Ended):
        actor(**given)
    if run.latents is None or len(run.steps) != len(scheduler.timesteps):
        got = f"{run.kind}, which takes {len(run.steps)} of {len(scheduler.timesteps)}"
        _checks.refuse("pipe", "take a step at each timestep of its scheduler", got)
    return Rehearsal(run.latents, run.steps)


class _Ended(Exception):
    """The last step of a rehearsal."""


class _Made(NamedTuple):
    """A denoiser's output."""

    sample: Any


class _Stepped(NamedTuple):
    """A scheduler's output."""

    prev_sample: Tensor


class _StandIn:
    """A denoiser that is not called: in all else the pipeline's own."""

    def __init__(self, denoiser: torch.nn.Module, run: _Run) -> None:
        self._denoiser, self._run = denoiser, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)

    def __call__(self, *args: Any, **kwargs: Any) -> _Made:
        return self._run.called(self._denoiser, args, kwargs)


class _Run:
    """A run in which the denoiser's answers are random: its questions are kept."""

    def __init__(self, model: Model, scheduler: Any, scales: Scales, kind: str) -> None:
        self.model, self.scheduler, self.scales, self.kind = model, scheduler, scales, kind
        self.latents: Tensor | None = None  # the first step's
        self.steps: list[list[Ask]] = []
        # in this step: whom, what, and the answer
        self._asked: list[tuple[torch.nn.Module, inspect.BoundArguments, Tensor]] = []
        self._answers: dict[tuple[object, ...], Tensor] = {}

    def called(self, denoiser: torch.nn.Module, args: tuple, kwargs: dict) -> _Made:
        """Random estimates; what was asked is kept."""
        bound = arguments(denoiser, args, kwargs)
        for name, value in bound.arguments.items():
            if isinstance(value, dict):  # pipelines change some between their calls
                bound.arguments[name] = dict(value)
        fed, axis = self._taken(bound), self.model.room
        if axis is not None:
            fed = fed.narrow(axis, 0, fed.shape[axis] // 2)
        answer = self._answer(len(self._asked), denoiser, fed)
        self._asked.append((denoiser, bound, answer))
        return _Made(self.model.given(answer))

    def step(self, output: Tensor, timestep: Any, sample: Tensor, *_: Any, **__: Any) -> _Stepped:
        """Latents as they were, after a look at the estimate that reached the scheduler."""
        asked, self._asked = self._asked, []
        asks = [self._ask(denoiser, bound, sample) for denoiser, bound, _ in asked]
        branches = sum(ask.copies for ask in asks)
        if branches not in (1, 2):
            rule = "make one estimate a step, or the prompt's and the negative one's"
            _checks.refuse("pipe", rule, f"{self.kind} with {branches}")
        answers = [estimate(answer, sample) for _, _, answer in asked]
        expected = combined(self.model, asks, answers, self.scales.of(asks))
        if not _close(output, expected):
            rule = "combine its estimates in every step as its record does (models/record.py)"
            _checks.refuse("pipe", rule, f"{self.kind}, otherwise in step {len(self.steps)}")
        self.latents = sample if self.latents is None else self.latents
        self.steps.append(asks)
        if len(self.steps) == len(self.scheduler.timesteps):
            raise _Ended
        return _Stepped(sample)

    def _taken(self, bound: inspect.BoundArguments) -> Tensor:
        return self.model.taken(bound.arguments[self.model.latents])

    def _ask(self, denoiser: torch.nn.Module, bound: inspect.BoundArguments, sample: Tensor) -> Ask:
        """A call of the latents alone, which are not kept."""
        fed = self._taken(bound)
        copies = len(fed) // len(sample)
        own = with_room(self.model, torch.cat([sample] * copies)) if copies else sample
        if not _same(fed, own.to(fed.dtype)):
            rule = "give its denoiser the latents and nothing beside them"
            _checks.refuse("pipe", rule, f"{self.kind}, which gives it {tuple(fed.shape)}")
        del bound.arguments[self.model.latents]
        return Ask(denoiser, bound, copies, fed.dtype)

    def _answer(self, place: int, denoiser: torch.nn.Module, fed: Tensor) -> Tensor:
        """Random numbers in the shape of a denoiser's estimates, by the call's place in a step."""
        shape = list(fed.shape)
        own = unwrapped(denoiser)
        channels = vars(own).get("out_channels") or own.config.get("out_channels")
        if fed.dim() == 4 and channels == 2 * shape[1]:
            shape[1] = channels
        key = place, *shape
        if key not in self._answers:
            seed = torch.Generator().manual_seed(place)
            made = torch.randn(shape, generator=seed, dtype=torch.float32, device="cpu")
            self._answers[key] = made.to(fed.device)
        return self._answers[key]


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _close(a: Tensor, b: Tensor) -> bool:
    largest = b.abs().max()
    return a.shape == b.shape and bool((a.to(b) - b).abs().max() <= ROUNDING * largest)
