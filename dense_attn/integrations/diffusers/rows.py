"""The rows of a denoiser's batch that see the prompt, as the pipeline and the tensors say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dense_attn import _checks


class Rows:
    """Follows the batches of one block, and looks at no tensor twice."""

    def __init__(self, pipe: Any, num_layouts: int, branches: str) -> None:
        self.pipe, self.num_layouts = pipe, num_layouts
        self.apart = branches == "calls"
        self.prompt_first = branches == "prompt first"
        self._step_text: Tensor | None = None  # of the first call of this step
        self._seen: Tensor | None = None  # the texts that were looked at
        # their version, and whether the pipeline guided
        self._state: tuple[int | None, bool] = (None, False)

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
            guides &= not (self.prompt_first and batch == known)  # Z-Image may stop to guide
            if guides and repeated and before is not None and 2 * batch == len(before):
                halves = before.chunk(2)  # one of them again
                negative, prompt = halves[::-1] if self.prompt_first else halves
                if torch.equal(text, negative) and not torch.equal(text, prompt):
                    return None
                return self._whole(0, batch)
        half = batch // 2 if guides else 0
        ends = (0, batch - half) if self.prompt_first else (half, batch)
        first, last = self._whole(*ends)
        state = version(text), guides
        new = text is not self._seen or state[0] is None or state != self._state
        if guides:
            check_halves(latents, by_value=new)
        elif new and batch != known:
            self._check_texts(latents, text)
        self._seen, self._state = text, state
        return first, last

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


def _twins(rows: Tensor) -> Tensor:
    """Which rows [B, ...] are equal, bool [B, B]."""
    return torch.stack([(rows == row).flatten(1).all(1) for row in rows])
