"""The rows of a denoiser's batch that see the prompt, as the pipeline and the tensors say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dense_attn import _checks


class Rows:
    """Follows the batches of one block, and looks at no tensor twice.

    Where a pipeline makes its texts anew in each call, those of a run's first two are looked at,
    and others of their shape are as they were.
    """

    def __init__(self, pipe: Any, num_layouts: int, branches: str) -> None:
        self.pipe, self.num_layouts = pipe, num_layouts
        self.apart = branches == "calls"
        self.prompt_first = branches == "prompt first"
        self.beside = False  # whether the last call was for neither the prompt nor the negative one
        self._step_text: Tensor | None = None  # of the first call of this step
        self._seen: Tensor | None = None  # the texts of the last call
        self._version: int | None = None  # theirs
        self._timesteps: object = None  # of that call's run
        self._first = 0  # rows of the run's first call
        self._state: tuple[object, ...] = ()  # their shape, and whether the pipeline guided
        # whether the second call of a run had texts of its own; None before that
        self._anew: bool | None = None

    def of(
        self,
        latents: Tensor,
        text: Tensor,
        repeated: bool,
        known: int | None = None,
        heard: bool = False,
    ) -> tuple[int, int] | None:
        """The first and last row that see the prompt.

        `known`: how many the pipeline encoded; `heard`: whether it said then that it guides.
        """
        batch, before = len(latents), self._step_text
        shared = self.apart and len(text) == 1  # FLUX takes one text for all rows
        if len(text) != batch and not shared:
            got = f"{len(text)} texts for {batch} rows"
            _checks.refuse("pipe", "give each row of latents its text", got)
        if not repeated:
            self._step_text = text
        if self.apart:  # the unconditional estimate is a second call of the same step
            guides = False
            if repeated and text is not before:
                return None
        else:
            guides = bool(getattr(self.pipe, "do_classifier_free_guidance", heard))
            halved = repeated and before is not None and 2 * batch == len(before)
            if self.prompt_first and self._stopped(batch, known, halved):
                guides = False
            if guides and halved:
                halves = before.chunk(2)  # one of them again
                negative, prompt = halves[::-1] if self.prompt_first else halves
                if torch.equal(text, negative) and not torch.equal(text, prompt):
                    return None
                return self._whole(0, batch)
        half = batch // 2 if guides else 0
        ends = (0, batch - half) if self.prompt_first else (half, batch)
        first, last = self._whole(*ends)
        new = self._is_new(text, guides)
        if guides:
            check_halves(latents, by_value=new)
        elif new and batch != known:
            self._check_texts(latents, text)
        return first, last

    def _stopped(self, batch: int, known: int | None, halved: bool) -> bool:
        """Whether a call of Z-Image's guides no more: it has half of the rows of the run's first.

        `halved`: whether it has half of those of a call in the same step.
        """
        if self._run() is not self._timesteps or not self._first:
            self._first = batch
        return batch == known or (2 * batch == self._first and not halved)

    def _run(self) -> object:
        """The timesteps of a run, which are its own."""
        return getattr(getattr(self.pipe, "scheduler", None), "timesteps", None)

    def _is_new(self, text: Tensor, guides: bool) -> bool:
        """Whether a call's values are to be looked at."""
        timesteps, state, number = self._run(), (text.shape, guides), version(text)
        if timesteps is not self._timesteps or state != self._state:
            self._anew, new = None, True
        elif text is self._seen:
            self._anew, new = False, number is None or number != self._version
        else:
            new = not self._anew
            self._anew = self._anew is not False
        self._seen, self._version, self._state = text, number, state
        self._timesteps = timesteps
        return new

    def _whole(self, first: int, last: int) -> tuple[int, int]:
        if (last - first) % self.num_layouts:
            got = f"{self.num_layouts} for {last - first} images"
            _checks.refuse("prompt", "have one entry or one for each prompt of the call", got)
        return first, last

    def _check_texts(self, latents: Tensor, text: Tensor) -> None:
        """Refuse a negative half that is not told of: the same latents, and texts of no prompt."""
        batch = len(text)
        if batch == 1:
            return
        rows = torch.arange(batch, dtype=torch.int64, device=text.device)
        owner = rows // (batch // self.num_layouts)
        others = ~_twins(text)
        if bool((others & (owner[:, None] == owner)).any() and (others & _twins(latents)).any()):
            rule = "tell that it guides (do_classifier_free_guidance)"
            _checks.refuse("pipe", rule, "rows of the same latents with two texts")


def check_halves(latents: Tensor, by_value: bool) -> None:
    """Refuse a batch that is not the same latents twice; a GPU is waited for where values count."""
    rule = "call its denoiser with two halves of the same latents when it guides"
    if len(latents) % 2:
        _checks.refuse("pipe", rule, f"a batch of {len(latents)}")
    if by_value and not torch.equal(*latents.chunk(2)):
        _checks.refuse("pipe", rule, "other latents")


def version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; tensors of inference mode do not count."""
    return None if tensor.is_inference() else tensor._version


_counted = WeakTensorKeyDictionary()  # the tokens that masks leave, and the masks' versions


def counted(mask: Tensor) -> list[int]:
    """The tokens that a mask [B, L] leaves in each row; a GPU is waited for once a mask."""
    number, kept = version(mask), _counted.get(mask)
    if kept is None or kept[0] != number or number is None:
        _counted[mask] = kept = number, mask.bool().sum(1).tolist()
    return kept[1]


def _twins(rows: Tensor) -> Tensor:
    """Which rows [B, ...] are equal, bool [B, B]."""
    return torch.stack([(rows == row).flatten(1).all(1) for row in rows])
