"""Semantic guidance of U-Nets: concepts in the batch, and both halves of it their guidance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import SemanticGuidance, _checks

from ..hooks import arguments, watched
from ..rows import check_halves
from ..steps import Steps
from ..text.encoding import encode, heard, missing, options_of
from .apart import estimates_of
from .runs import Runs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Model

ROWS = "sample", "timestep", "timestep_cond", "class_labels"  # arguments that may have them
RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@contextmanager
def guided_unet(
    pipe: DiffusionPipeline,
    model: Model,
    options: dict[str, Any],
    concepts: list[str],
    batched: bool,
) -> Iterator[SemanticGuidance]:
    """One block of a pipeline whose denoiser is a U-Net."""
    guided = _Guided(pipe, options, concepts, batched)
    with (
        heard(pipe, guided.hear),
        watched(pipe.unet, guided, guided.before_call, guided.after_call),
    ):
        yield guided.runs.guidance


class _Guided:
    """One block: concepts join the batch of each call, or follow it, and leave it as guidance."""

    def __init__(
        self,
        pipe: DiffusionPipeline,
        options: dict[str, Any],
        concepts: list[str],
        batched: bool,
    ) -> None:
        self.pipe, self.runs, self.concepts, self.batched = pipe, Runs(options), concepts, batched
        # the concepts under the options of encode_prompt
        self.encoded: dict[tuple, tuple[Tensor | None, ...]] = {}
        self._encode({})
        self.steps = Steps(pipe)
        self.guidance: SemanticGuidance | None = None
        self.paused = 0  # blocks inside of this one
        self._apart: list[dict[str, Any]] = []  # calls of concepts by themselves

    def hear(self, given: dict[str, Any]) -> None:
        """Take the arguments of a call of encode_prompt: concepts are encoded as its prompt is."""
        if missing(self.pipe) is None:
            self._encode(options_of(self.pipe, given))

    def _encode(self, options: dict[str, Any]) -> None:
        key = tuple(options.items())
        if key not in self.encoded:
            encoded = encode(self.pipe, self.concepts, **options) if self.concepts else (None, None)
            self.encoded[key] = encoded
        text, _, *pooled = self.encoded[key]
        self.text, self.pooled = text, pooled[0] if pooled else None

    def before_call(
        self, unet: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """The call with the concepts' rows after those of the prompt, where they go together."""
        if self.paused:
            return None
        bound = arguments(unet, args, kwargs)
        given = bound.arguments
        self._check(given)
        begins = self.steps.follow(given["timestep"])
        check_halves(given["sample"], by_value=begins)
        if begins:
            self.guidance = self.runs.begin(self.steps.total)
        if self.steps.repeated:
            rule = "call its U-Net once a step with semantic guidance"
            _checks.refuse("pipe", rule, "a second call of a step")
        self.guidance.guidance_scale = self.pipe.guidance_scale  # a callback may change it
        rows = len(given["sample"]) // 2
        if not self.batched:
            places = range(len(self.concepts))
            self._apart = [self._with(given, partial(_alone, rows, e)) for e in places]
            return None
        given.update(self._with(given, partial(_together, rows, len(self.concepts))))
        return bound.args[1:], bound.kwargs

    def _with(self, given: dict[str, Any], change: Callable[..., Any]) -> dict[str, Any]:
        """A call's arguments, changed where they have rows, and texts by those of concepts."""
        found = given | {name: change(given[name]) for name in ROWS if name in given}
        found["encoder_hidden_states"] = change(given["encoder_hidden_states"], self.text)
        added = given.get("added_cond_kwargs")
        if added:
            pooled = {name: self.pooled if name == "text_embeds" else None for name in added}
            found["added_cond_kwargs"] = {
                name: change(value, pooled[name]) for name, value in added.items()
            }
        return found

    def after_call(self, unet: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Two equal halves: the pipeline's own guidance leaves them as they are."""
        if self.paused:
            return None
        estimates = output[0]
        rows = 2 + (len(self.concepts) if self.batched else 0)
        eps = estimates.unflatten(0, (rows, -1))
        edits = eps[2:]
        if self._apart:
            edits, self._apart = estimates_of(unet, self._apart), []
        guided = self.guidance(self.steps.index, eps[0], eps[1], edits)
        both = torch.cat([guided, guided])
        return (both, *output[1:]) if isinstance(output, tuple) else type(output)(sample=both)

    def _check(self, given: dict[str, Any]) -> None:
        if not self.pipe.do_classifier_free_guidance:
            rule = "be above 1 for semantic guidance"
            _checks.refuse("guidance_scale", rule, self.pipe.guidance_scale)
        rescale = getattr(self.pipe, "guidance_rescale", 0)
        if rescale:
            _checks.refuse("guidance_rescale", "be 0 with semantic guidance", rescale)
        for name in RESIDUALS:
            if given.get(name) is not None:
                _checks.refuse("pipe", "have no ControlNet or adapter with semantic guidance", name)
        if "image_embeds" in (given.get("added_cond_kwargs") or {}):
            _checks.refuse("pipe", "have no IP-Adapter with semantic guidance", "image_embeds")


def _together(rows: int, count: int, value: Any, concepts: Tensor | None = None) -> Any:
    """A tensor of both halves of a batch with the concepts' rows; a number is for all rows."""
    if not _has_rows(value, rows):
        return value
    if concepts is None:  # what the prompt's rows have
        more = value[rows:].repeat(count, *[1] * (value.dim() - 1))
    else:
        more = concepts.to(value).repeat_interleave(rows, 0)
    return torch.cat([value, more])


def _alone(rows: int, place: int, value: Any, concepts: Tensor | None = None) -> Any:
    """The prompt's rows of an argument, or one concept's text for each of them."""
    if not _has_rows(value, rows):
        return value
    if concepts is None:
        return value[rows:]
    own = concepts[place].to(value)
    return own.expand(rows, *own.shape)


def _has_rows(value: Any, rows: int) -> bool:
    """Whether a value is a tensor of both halves of a batch."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == 2 * rows
