"""Settings of a chain, on the way to the noise and back, and their words in refusals."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from dense_attn import _checks

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

SAMPLER = ("method", "mix", "gamma", "alternate", "exact", "backend")
WORDS = {  # what the sampler is given here, as a caller knows it
    "timesteps": "num_inference_steps",
    "alphas_cumprod": "the noise schedule of pipe",
    "scheduler": "pipe.scheduler",
    "decode_fn": "pipe.vae",
}


@dataclass(frozen=True)
class Settings:
    """How images are sampled; the way back takes the same.

    Attributes:
        guidance_scale: None for the pipeline's own, 3 at most.
        sampler: further arguments of `ReversibleSampler`.
        call: further arguments of the pipeline's call.
        size: height and width of the images in pixels, where the pipeline's call is told.
        frames: of videos.
    """

    prompt: str | list[str]
    negative_prompt: str | list[str]
    guidance_scale: float | None
    num_inference_steps: int
    sampler: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    size: tuple[int | None, int | None] = (None, None)
    frames: int | None = None

    def checked(self) -> Settings:
        """Refuse numbers and names that no chain knows; numpy's whole numbers are Python's."""
        steps = self.num_inference_steps
        if not is_whole(steps) or steps < 1:
            _checks.refuse("num_inference_steps", "be a whole number of at least 1", repr(steps))
        if self.guidance_scale is not None:
            _checks.number("guidance_scale", self.guidance_scale)
        for argument, given in (("sampler", self.sampler), ("call", self.call)):
            if not isinstance(given, dict):
                _checks.refuse(argument, "be a dict", type(given).__name__, TypeError)
        for name in self.sampler:
            _checks.choice("sampler", name, SAMPLER)
        return replace(self, num_inference_steps=int(steps))

    @property
    def made(self) -> str:
        """The kind of things that are sampled."""
        return "images" if self.frames is None else "videos"

    def texts(self, count: int) -> dict[str, list[str]]:
        """A prompt and a negative prompt for each image."""
        if not count:
            _checks.refuse("prompt", "hold at least one", "none")
        texts = {"prompt": self.prompt, "negative_prompt": self.negative_prompt}
        return {name: listed(name, text, count, self.made) for name, text in texts.items()}


def listed(argument: str, text: str | list[str], count: int, made: str) -> list[str]:
    """A text for each of so many images or videos."""
    texts = [text] * count if isinstance(text, str) else text
    if not isinstance(texts, list) or not all(isinstance(one, str) for one in texts):
        _checks.refuse(argument, "be a string or a list of strings", repr(text), TypeError)
    if len(texts) != count:
        _checks.refuse(argument, f"hold one entry for each of the {count} {made}", len(texts))
    return texts


def check_unguided(argument: str, texts: list[str], unguided: float) -> None:
    """Refuse negative prompts that nothing would be done with."""
    if any(texts):
        rule = f"be empty where guidance_scale is {unguided:g} (no guidance)"
        _checks.refuse(argument, rule, texts)


def sides(unit: int, height: int | None, width: int | None) -> tuple[int | None, int | None]:
    """An image's height and width, of whole tokens, or None for the pipeline's own."""
    given = {"height": height, "width": width}
    for argument, side in given.items():
        if side is not None and (not is_whole(side) or side <= 0 or side % unit):
            _checks.refuse(argument, f"be a positive multiple of {unit}", repr(side))
    return tuple(side if side is None else int(side) for side in given.values())


def is_whole(number: object) -> bool:
    """Whether a number is an int, or one of numpy's."""
    return isinstance(number, (int, np.integer)) and not isinstance(number, bool)


def in_words(pipe: DiffusionPipeline, **more: str) -> AbstractContextManager[None]:
    """A sampler's refusals in the words of who called invert, reconstruct or optimize."""
    network = "pipe.unet" if getattr(pipe, "unet", None) is not None else "pipe.transformer"
    own = {
        "dtype": f"{network}'s dtype",
        "eps_fn": network,
        "eps_fn's result": f"{network}'s result",
    }
    return _checks.renamed(WORDS | own | more)
