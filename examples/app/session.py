"""One server's model and the runs on it, one at a time."""

from __future__ import annotations

import secrets
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dense_attn import _memory
from dense_attn.integrations.diffusers import apply_layout, semantic_guidance

from . import pictures
from .attention import counted
from .code import code_of
from .models import Model
from .refused import Refused
from .settings import MOST_SEED, Settings, to_json

if TYPE_CHECKING:
    from PIL import Image

Told = Callable[[float, str], None]  # the part of a run that is done, and a sentence on it


class CancelledError(Exception):
    """A run that its user has stopped; the message says how far it came."""


@dataclass(frozen=True)
class Cost:
    """The mean time and the largest memory of images."""

    seconds: float
    extra_bytes: int | None  # at the peak, where the system tells


@dataclass(frozen=True)
class Sample:
    """A seed's images, and each region's overlap with its colour; None where not counted."""

    seed: int
    plain: Image.Image
    placed: Image.Image
    plain_overlaps: list[float | None]
    overlaps: list[float | None]


@dataclass(frozen=True)
class Run:
    """A run's samples and what is told of them."""

    settings: Settings
    samples: list[Sample]
    inside: list[tuple[float, float]] | None  # each region's share of attention, without and with
    words: Image.Image
    plain_cost: Cost
    cost: Cost
    files: dict[str, bytes]  # by name
    code: str
    notes: list[str]  # the library's warnings


class _Clock:
    """The steps of a run, and the time that is left by their mean."""

    def __init__(self, steps: int, told: Told, stop: threading.Event) -> None:
        self.steps, self.told, self.stop = steps, told, stop
        self.done, self.start = 0, time.perf_counter()

    def step(self, what: str) -> None:
        """Count a step, or leave the run where it is to stop."""
        self.done += 1
        if self.stop.is_set():
            raise CancelledError(f"cancelled after {self.done} of {self.steps} steps")
        left = (time.perf_counter() - self.start) / self.done * (self.steps - self.done)
        text = f"{what}: step {self.done} of {self.steps}, {left:.0f} s left"
        self.told(self.done / self.steps, text)


class Session:
    """A model and its lock: the library's blocks are on for the whole process."""

    def __init__(self, model: Model) -> None:
        self.model, self._lock = model, threading.Lock()

    def run(
        self,
        settings: Settings,
        told: Told = lambda *_: None,
        stop: threading.Event | None = None,
    ) -> Run:
        """The plain image and that of the layout for each seed.

        Args:
            settings: checked; a seed of -1 is drawn before.
            told: hears of every step.
            stop: set from another thread, it ends the run at its next step.

        Raises:
            Refused: with the field and a sentence; nothing is kept of the run.
            CancelledError: it was stopped.
        """
        self.model.check(settings)
        stop = stop or threading.Event()
        with self._lock:
            if stop.is_set():
                raise CancelledError("cancelled before it began")
            clock = _Clock(2 * settings.samples * settings.steps, told, stop)
            try:
                return self._run(settings, clock)
            except Refused:
                raise
            except (torch.OutOfMemoryError, MemoryError) as error:
                raise Refused("run", f"memory is too small: {error}".splitlines()[0]) from error
            except (ValueError, TypeError, RuntimeError) as error:  # also a CPU's lack of memory
                sentence = str(error).strip() or type(error).__name__
                raise Refused("run", sentence.splitlines()[0]) from error

    def _run(self, settings: Settings, clock: _Clock) -> Run:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", UserWarning)
            samples, shares, costs = self._samples(settings, clock)
        notes = list(dict.fromkeys(str(w.message) for w in heard if w.category is UserWarning))
        said = {s.seed: to_json(replace(settings, seed=s.seed), self.model.name) for s in samples}
        return Run(
            settings,
            samples,
            np.mean(shares, 0).tolist() if shares else None,
            pictures.words_picture(settings.labels, self._grid(samples[0].placed)),
            *map(_mean, costs),
            {f"seed-{s.seed}.png": pictures.png(s.placed, said[s.seed]) for s in samples},
            code_of(settings, self.model, settings.seed),
            notes,
        )

    def _samples(self, settings: Settings, clock: _Clock) -> tuple[list, list, tuple[list, list]]:
        """The samples, the shares of attention of each, and the costs of plain and placed ones."""
        samples, shares, costs = [], [], ([], [])
        for seed in range(settings.seed, settings.seed + settings.samples):
            plain, cost = self._image(settings, seed, clock, None)
            placed, placed_cost = self._image(settings, seed, clock, shares)
            both = [self._overlaps(settings, image) for image in (plain, placed)]
            samples.append(Sample(seed, plain, placed, *both))
            costs[0].append(cost)
            costs[1].append(placed_cost)
        return samples, shares, costs

    def _image(
        self, settings: Settings, seed: int, clock: _Clock, shares: list | None
    ) -> tuple[Image.Image, Cost]:
        """An image, plain or, where there are shares to add to, of the layout."""
        pipe, prompt = self.model.pipe, settings.full_prompt
        regions = None if shares is None else settings.regions()
        what = f"seed {seed}, {'plain' if regions is None else 'with the layout'}"

        def after_step(pipe: Any, index: int, timestep: Any, values: dict) -> dict:
            clock.step(what)
            return values

        def image() -> Any:
            with ExitStack() as blocks:
                if regions is not None:
                    layout = apply_layout(pipe, prompt, regions, **settings.options())
                    blocks.enter_context(layout)
                    inside = blocks.enter_context(counted(pipe, len(regions)))
                    if settings.edits:
                        blocks.enter_context(semantic_guidance(pipe, list(settings.edits)))
                made = pipe(
                    prompt,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance,
                    generator=torch.Generator().manual_seed(seed),
                    callback_on_step_end=after_step,
                ).images[0]
            if regions is not None and inside.shares:
                shares.append(inside.shares)
            return made

        start = time.perf_counter()
        extra, made = _measured(image)
        return made, Cost(time.perf_counter() - start, extra)

    def _overlaps(self, settings: Settings, image: Image.Image) -> list[float | None]:
        """Each region's intersection with the pixels of its words' colour over their union."""
        if self.model.coloured is None:
            return [None] * len(settings.painted)
        pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None] / 255
        found, overlaps = self.model.coloured(pixels), []
        rows, columns = (
            ((np.arange(extent) + 0.5) * side / extent).astype(int)
            for extent, side in zip(pixels.shape[2:], settings.labels.shape)
        )
        labels = torch.from_numpy(settings.labels[rows][:, columns].copy())
        for label in settings.painted:
            named = [found[word][0] for word in settings.words_of(label).split() if word in found]
            target = labels == label
            shares = [float((seen & target).sum() / (seen | target).sum()) for seen in named[:1]]
            overlaps.append(shares[0] if shares else None)
        return overlaps

    def _grid(self, image: Image.Image) -> tuple[int, int]:
        """The height and width of the latents of an image."""
        factor = getattr(self.model.pipe, "vae_scale_factor", None) or 8
        return max(1, image.height // factor), max(1, image.width // factor)


def any_seed() -> int:
    """A seed for whoever asks for any."""
    return secrets.randbelow(min(MOST_SEED, 2**31))


def _measured(call: Callable[[], Any]) -> tuple[int | None, Any]:
    """The bytes that a call adds at its peak, of the GPU where there is one, and its result."""
    if not torch.cuda.is_available():
        return _memory.peak_extra_bytes(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = call()
    return torch.cuda.max_memory_allocated() - before, made


def _mean(costs: list[Cost]) -> Cost:
    known = [cost.extra_bytes for cost in costs if cost.extra_bytes is not None]
    extra = max(known) if known else None
    return Cost(sum(cost.seconds for cost in costs) / len(costs), extra)
