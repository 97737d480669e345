"""Semantic guidance of U-Nets: concepts in the batch, and both halves of it their guidance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import SemanticGuidance, _checks

from ..hooks import arguments, watched
from ..rows import check_halves
from ..steps import Steps
from ..text.encoding import encode, heard, missing, options_of
from .concepts import Runs

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..models.record import Model

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
    """One block of a pipeline whose denoiser is a U-Net, which gets all concepts in one batch."""
    if not batched:
        _checks.refuse("batch_concepts", f"be True for a {model.denoiser}", batched)
    guided = _Guided(pipe, options, concepts)
    with (
        heard(pipe, guided.hear),
        watched(pipe.unet, guided, guided.before_call, guided.after_call),
    ):
        yield guided.runs.guidance


class _Guided:
    """One block: concepts join the batch of each call, and leave it as guidance."""

    def __init__(
        self, pipe: DiffusionPipeline, options: dict[str, Any], concepts: list[str]
    ) -> None:
        self.pipe, self.runs, self.concepts = pipe, Runs(options), concepts
        # the concepts under the options of encode_prompt
        self.encoded: dict[tuple, tuple[Tensor | None, ...]] = {}
        self._encode({})
        self.steps = Steps(pipe)
        self.guidance: SemanticGuidance | None = None
        self.paused = 0  # blocks inside of this one

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
        """The call with the concepts' rows after those of the prompt."""
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

        def with_edits(tensor: Tensor | None, concepts: Tensor | None = None) -> Tensor | None:
            return self._with_edits(rows, tensor, concepts)

        for name in ("sample", "timestep", "timestep_cond", "class_labels"):
            if name in given:
                given[name] = with_edits(given[name])
        given["encoder_hidden_states"] = with_edits(given["encoder_hidden_states"], self.text)
        added = given.get("added_cond_kwargs") or {}
        if added:
            pooled = {name: self.pooled if name == "text_embeds" else None for name in added}
            given["added_cond_kwargs"] = {
                name: with_edits(value, pooled[name]) for name, value in added.items()
            }
        return bound.args[1:], bound.kwargs

    def _with_edits(
        self, rows: int, tensor: Tensor | None, concepts: Tensor | None
    ) -> Tensor | None:
        """A tensor of both halves of a batch with the concepts' rows; a number is for all rows."""
        if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != 2 * rows:
            return tensor
        if concepts is None:  # what the prompt's rows have
            more = tensor[rows:].repeat(len(self.concepts), *[1] * (tensor.dim() - 1))
        else:
            more = concepts.to(tensor).repeat_interleave(rows, 0)
        return torch.cat([tensor, more])

    def after_call(self, unet: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Two equal halves: the pipeline's own guidance leaves them as they are."""
        if self.paused:
            return None
        estimates = output[0]
        eps = estimates.unflatten(0, (2 + len(self.concepts), -1))
        guided = self.guidance(self.steps.index, eps[0], eps[1], eps[2:])
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
