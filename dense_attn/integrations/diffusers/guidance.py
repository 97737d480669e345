"""semantic_guidance: concepts turned up or down in the images of a Stable Diffusion pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import SemanticGuidance, _checks

from .concepts import Edit, Runs, settings, warn_of_idle
from .hooks import arguments, unwrapped, watched
from .models import model_of
from .rows import check_halves
from .steps import Steps
from .text.encoding import encode, heard, missing, options_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from dense_attn.sega.vectors import Vectors

RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@contextmanager
def semantic_guidance(
    pipe: DiffusionPipeline,
    edits: Sequence[Edit] = (),
    *,
    momentum_scale: float = 0.1,
    momentum_beta: float = 0.4,
    backend: str = "auto",
    apply: Vectors | None = None,
) -> Iterator[SemanticGuidance]:
    """Calls of the pipeline inside the block are guided by concepts, in the batch of the U-Net.

    The estimate that the scheduler gets is `SemanticGuidance`'s,
    `eps_u + g*(eps_t - eps_u) + sum_e w_e * d_e where |d_e| >= quantile(|d_e|, threshold_e)` with
    `d_e = scale_e*(eps_e - eps_u)`, warm-up and momentum, and g the guidance scale of the
    pipeline's call. Blocks inside of a block: the innermost counts. Call `pipe` itself, not another
    pipeline around the same model.

    Args:
        pipe: of a UNet2DConditionModel (Stable Diffusion 1, 2, XL), called with a guidance scale
            above 1.
        edits: the concepts, encoded with the options of the call (LoRA scale, `clip_skip`).
        momentum_scale, momentum_beta: how much of the momentum is added, and how much of it is
            kept.
        backend: as in `sega_guidance`.
        apply: the guidance vectors of another run of as many steps and from the same noise, which
            are added too; there may then be no edits.

    Yields:
        The block's `SemanticGuidance`, whose `record()` returns a list that the next run fills with
        its guidance vectors, for `apply`.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; the pipeline is
            as it was.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023.

    Example:
        >>> import torch
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import Edit, semantic_guidance
        >>> pipe = tiny_pipeline(StableDiffusionPipeline)
        >>> smile, hat = Edit("smiling", scale=4, warmup=1), Edit("hat", warmup=2, reverse=True)
        >>> with semantic_guidance(pipe, [smile, hat]) as guidance:
        ...     vectors = guidance.record()
        ...     image = pipe("a face", num_inference_steps=4, generator=torch.manual_seed(0))
        >>> with semantic_guidance(pipe, apply=vectors):  # more of both, without an estimate
        ...     image = pipe("a drawing", num_inference_steps=4, generator=torch.manual_seed(0))
    """
    unet = getattr(pipe, "unet", None)
    if type(unwrapped(unet)).__name__ != "UNet2DConditionModel":
        _checks.refuse("pipe", "have a UNet2DConditionModel", type(pipe).__name__)
    model_of(pipe)
    options = settings(edits, momentum_scale, momentum_beta, backend, apply)
    warn_of_idle(edits, 3)  # at the user's `with`
    guided = _Guided(pipe, options, [edit.prompt for edit in edits])
    with heard(pipe, guided.hear), watched(unet, guided, guided.before_call, guided.after_call):
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
