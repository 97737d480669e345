"""The guider of `semantic_guider`, apart because its base class is diffusers'."""

from __future__ import annotations

from typing import Any, ClassVar

from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from dense_attn import SemanticGuidance, _checks

from .runs import Runs


class SemanticGuider(BaseGuidance):
    """Predictions of the prompt, the negative prompt and each concept, as one estimate.

    Args:
        concepts: what the denoiser is given for each in the place of the prompt's, of one row.
        options: the arguments of `SemanticGuidance`.
        channels: the axis of an estimate's channels.
    """

    _input_predictions: ClassVar[list[str]] = ["pred_cond", "pred_uncond"]

    def __init__(
        self, concepts: list[dict[str, Any]], options: dict[str, Any], channels: int = 1
    ) -> None:
        super().__init__()
        self.concepts, self.runs, self.channels = concepts, Runs(options), channels
        self.guidance_scale = options["guidance_scale"]
        self.register_to_config(**options)
        self._names = [f"pred_edit_{e}" for e in range(len(options["edit_guidance_scale"]))]
        self._guidance: SemanticGuidance | None = None
        self._last = -1

    def new(self, **changes: Any) -> SemanticGuider:
        """A copy, with other options where they are given."""
        return SemanticGuider(self.concepts, self.runs.options | changes, self.channels)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The inputs of each call of the denoiser, from a pipeline's state and its names there."""
        named = {
            name: tuple(getattr(data, one, None) for one in field)
            if isinstance(field, tuple)
            else getattr(data, field, None)
            for name, field in input_fields.items()
        }
        return self.prepare_inputs(named)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The inputs of each call of the denoiser, from the prompt's and the negative prompt's."""
        data = {
            name: value if isinstance(value, tuple) else (value,) * 2
            for name, value in data.items()
        }
        if any(value is not None for value in data.get("image_embeds", ())):
            _checks.refuse("pipe", "have no IP-Adapter with semantic guidance", "image_embeds")
        predictions = self._input_predictions if self._enabled else self._input_predictions[:1]
        batches = [self._prepare_batch(data, i, name) for i, name in enumerate(predictions)]
        for concept, name in zip(self.concepts if self._enabled else (), self._names):
            inputs = {key: value[0] for key, value in data.items()}
            for key, text in concept.items():
                inputs[key] = _rows(text, inputs[key])
            batches.append(
                self._prepare_batch({key: (value,) for key, value in inputs.items()}, 0, name)
            )
        return batches

    def forward(
        self, pred_cond: Tensor, pred_uncond: Tensor | None = None, **edits: Tensor
    ) -> GuiderOutput:
        """The estimate; momentum begins anew with a run."""
        if not self._enabled:
            return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)
        if self._guidance is None or self._step <= self._last:
            self._guidance = self.runs.begin(self._num_inference_steps)
        self._last = self._step
        estimates = pred_uncond, pred_cond, *(edits[name] for name in self._names)
        first = [estimate.movedim(self.channels, 1).contiguous() for estimate in estimates]
        pred = self._guidance(self._step, *first[:2], first[2:])
        pred = pred.movedim(1, self.channels).contiguous()
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        """Whether the call being prepared is the prompt's."""
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        """Calls of the denoiser in a step."""
        return 2 + len(self._names) if self._enabled else 1


def _rows(text: Any, prompt: Any) -> Any:
    """A concept's one row for each of the prompt's."""
    if text is None or isinstance(text, list):
        return text and text * len(prompt)
    return text if prompt is None else text.to(prompt).expand(len(prompt), *text.shape[1:])
