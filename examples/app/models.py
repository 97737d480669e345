"""The pipeline behind the page, and what the page must know of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dense_attn._command import UserError

from .refused import refuse
from .settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

SMALL = "the small model that is shipped"


@dataclass(frozen=True)
class Model:
    """A pipeline under its name.

    Args:
        pipe: a diffusers pipeline of images that `apply_layout` knows.
        name: what files and the page call it.
        code: the lines of Python that load it, imports first.
        joint: whether text and image are in one attention.
        known: the words that it knows, where they are few.
        longest: how many words it reads, where that is known.
        coloured: the pixels of each colour it knows, as bool [1, H, W] by the colour's word, in
            images [1, 3, H, W], where they can be counted.
    """

    pipe: Any
    name: str
    code: tuple[str, ...]
    joint: bool = False
    known: tuple[str, ...] = ()
    longest: int | None = None
    coloured: Callable[[Tensor], dict[str, Tensor]] | None = None

    def check(self, settings: Settings) -> None:
        """Refuse words that the model does not know, and prompts that it would cut."""
        if not self.known:
            return
        texts = [("prompt", "the prompt", settings.full_prompt)]
        for label in settings.painted:
            texts.append(("words", f"colour {label}", settings.words_of(label)))
        texts += [
            ("edits", f"edit {number}", edit.prompt)
            for number, edit in enumerate(settings.edits, 1)
        ]
        for field, name, text in texts:
            words = text.split()
            if unknown := dict.fromkeys(word for word in words if word not in self.known):
                refuse(field, name, "have words that the model knows", ", ".join(unknown))
            if len(words) > self.longest:
                refuse(field, name, f"have at most {self.longest} words", len(words))


def small_model() -> Model:
    """The shipped model, which needs no network."""
    from dense_attn.examples.tiny_scenes import model, scenes

    code = (
        "from dense_attn.examples.tiny_scenes.model import load_pipeline",
        "pipe = load_pipeline()",
    )
    limits = {"known": scenes.WORDS, "longest": model.TOKENS - 2}
    pipe = model.load_pipeline()
    return Model(pipe, SMALL, code, **limits, coloured=scenes.colour_masks)


def load_model(name: str | None) -> Model:
    """The model of a name or path, on the GPU where there is one; None: the shipped one."""
    if name is None:
        return small_model()
    from dense_attn.examples._tiny_pipeline import load

    try:
        return of_pipeline(load("DiffusionPipeline", name), name)
    except (OSError, ValueError, TypeError) as error:
        said = str(error).strip().splitlines()[0]
        rule = "--model must be a diffusers pipeline that apply_layout knows"
        raise UserError(f"{rule}, got {name!r}: {said}") from None


def of_pipeline(pipe: Any, name: str) -> Model:
    """A pipeline of images as the page takes it; ValueError where it is none."""
    from dense_attn.integrations.diffusers.models import model_of

    record = model_of(pipe)
    if record.video:
        raise ValueError("it makes videos")
    pipe.set_progress_bar_config(disable=True)
    gpu = torch.cuda.is_available()
    dtype, device = ("bfloat16", "cuda") if gpu else ("float32", "cpu")
    code = (
        "from diffusers import DiffusionPipeline",
        f"pipe = DiffusionPipeline.from_pretrained({json.dumps(name)}, torch_dtype=torch.{dtype})",
        f'pipe.to("{device}")',
    )
    return Model(pipe, name, code, joint=record.joint)
