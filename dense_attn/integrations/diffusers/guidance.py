"""semantic_guidance: concepts turned up or down in the images of a Stable Diffusion pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dense_attn import SemanticGuidance, _checks

from .hooks import arguments, unwrapped, watched
from .models import model_of
from .rows import check_halves
from .steps import Steps
from .text.encoding import encode, heard, missing, options_of

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


@dataclass(frozen=True)
class Edit:
    """A concept that an image gets more of, or less.

    Args:
        prompt: the concept in words.
        scale: how strongly it pulls.
        threshold: 0 to 1, the share of entries that it leaves alone.
        warmup, cooldown: the steps, from 0, at which it begins and ends; None: no end. Schedulers
            of two calls of the network a step (Heun, PNDM's first) count both. A warning names a
            concept that ends before it begins, or begins after the last step of a run.
        weight: against other concepts; a negative one counts as 0, with a warning.
        reverse: away from the concept, not towards it.
    """

    prompt: str
    scale: float = 5.0
    threshold: float = 0.9
    warmup: float = 10
    cooldown: float | None = None
    weight: float = 1.0
    reverse: bool = False


@contextmanager
def semantic_guidance(
    pipe: DiffusionPipeline,
    edits: Sequence[Edit],
    *,
    momentum_scale: float = 0.1,
    momentum_beta: float = 0.4,
    backend: str = "auto",
) -> Iterator[None]:
    """Calls of the pipeline inside the block are guided by concepts too, evaluated in the same
    batch of the U-Net.

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

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names; the pipeline is
            as it was.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023.

    Example:
        >>> from diffusers import StableDiffusionPipeline
        >>> from dense_attn.examples._tiny_pipeline import tiny_pipeline
        >>> from dense_attn.integrations.diffusers import Edit, semantic_guidance
        >>> pipe = tiny_pipeline(StableDiffusionPipeline)
        >>> with semantic_guidance(pipe, [Edit("smiling", scale=4, warmup=1), Edit("hat", warmup=2, reverse=True)]):
        ...     image = pipe("a face", num_inference_steps=4).images[0]
    """
    unet = getattr(pipe, "unet", None)
    if type(unwrapped(unet)).__name__ != "UNet2DConditionModel":
        _checks.refuse("pipe", "have a UNet2DConditionModel", type(pipe).__name__)
    model_of(pipe)
    options = settings(edits, momentum_scale, momentum_beta, backend)
    for sentence in idle(edits):
        warnings.warn(sentence, stacklevel=3)  # at the user's `with`
    guided = _Guided(pipe, options, [edit.prompt for edit in edits])
    with heard(pipe, guided.hear), watched(unet, guided, guided.before_call, guided.after_call):
        yield


def settings(
    edits: Sequence[Edit], momentum_scale: float, momentum_beta: float, backend: str
) -> dict[str, Any]:
    """The arguments of `SemanticGuidance` that concepts stand for, all of them good."""
    if isinstance(edits, Edit) or not isinstance(edits, Sequence) or not edits:
        _checks.refuse("edits", "be a list of Edit", repr(edits), TypeError)
    for i, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            _checks.refuse(f"edits[{i}]", "be an Edit", type(edit).__name__, TypeError)
        if not isinstance(edit.prompt, str):
            _checks.refuse(
                f"edits[{i}].prompt", "be a string", type(edit.prompt).__name__, TypeError
            )
    options = {
        "edit_guidance_scale": [edit.scale for edit in edits],
        "edit_threshold": [edit.threshold for edit in edits],
        "edit_warmup_steps": [edit.warmup for edit in edits],
        "edit_cooldown_steps": [edit.cooldown for edit in edits],
        "edit_weights": [edit.weight for edit in edits],
        "reverse_editing_direction": [edit.reverse for edit in edits],
        "edit_momentum_scale": momentum_scale,
        "edit_mom_beta": momentum_beta,
        "backend": backend,
    }
    SemanticGuidance(**options)
    return options


def idle(edits: Sequence[Edit]) -> Iterator[str]:
    """A sentence for each concept that can act in no run."""
    for i, edit in enumerate(edits):
        if edit.cooldown is not None and edit.cooldown <= edit.warmup:
            rule = f"be above its warmup of {edit.warmup} for the concept to act"
            yield f"edits[{i}].cooldown must {rule}, got {edit.cooldown}"
        if edit.weight < 0:
            rule = "be above 0 for the concept to act (reverse=True turns away from it)"
            yield f"edits[{i}].weight must {rule}, got {edit.weight}"


def warn_of_late(options: dict[str, Any], steps: int, told: set[int]) -> None:
    """Name the concepts that a run of so many steps ends before, each once."""
    for i, warmup in enumerate(options["edit_warmup_steps"]):
        if warmup > steps - 1 and i not in told:
            told.add(i)
            rule = f"be at most {steps - 1}, the last of the run's {steps} steps, for the concept to act"
            warnings.warn(f"edits[{i}].warmup must {rule}, got {warmup}", stacklevel=3)


class _Guided:
    """One block: concepts join the batch of each call, and leave it as guidance."""

    def __init__(
        self, pipe: DiffusionPipeline, options: dict[str, Any], concepts: list[str]
    ) -> None:
        self.pipe, self.options, self.concepts = pipe, options, concepts
        self.encoded: dict[
            tuple, tuple[Tensor | None, ...]
        ] = {}  # the concepts under the options of encode_prompt
        self._encode({})
        self.steps = Steps(pipe)
        self.guidance: SemanticGuidance | None = None
        self.told: set[int] = set()  # concepts that a run was too short for
        self.paused = 0  # blocks inside of this one

    def hear(self, given: dict[str, Any]) -> None:
        """Take the arguments of a call of encode_prompt: concepts are encoded as its prompt is."""
        if missing(self.pipe) is None:
            self._encode(options_of(self.pipe, given))

    def _encode(self, options: dict[str, Any]) -> None:
        key = tuple(options.items())
        if key not in self.encoded:
            self.encoded[key] = encode(self.pipe, self.concepts, **options)
        text, _, *pooled = self.encoded[key]
        self.text, self.pooled = text, pooled[0] if pooled else None

    def before_call(
        self, unet: torch.nn.Module, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """The same call with the concepts' rows after those of the prompt."""
        if self.paused:
            return None
        bound = arguments(unet, args, kwargs)
        given = bound.arguments
        self._check(given)
        begins = self.steps.follow(given["timestep"])
        check_halves(given["sample"], by_value=begins)
        if begins:
            warn_of_late(self.options, self.steps.total, self.told)
            self.guidance = SemanticGuidance(**self.options)
        if self.steps.repeated:
            _checks.refuse(
                "pipe",
                "call its U-Net once a step with semantic guidance",
                "a second call of a step",
            )
        self.guidance.guidance_scale = self.pipe.guidance_scale  # a callback may change it
        rows, edits = len(given["sample"]) // 2, len(self.text)

        def with_edits(tensor: Tensor | None, concepts: Tensor | None = None) -> Tensor | None:
            if not isinstance(tensor, Tensor) or tensor.dim() == 0 or len(tensor) != 2 * rows:
                return tensor  # a number for all
            if concepts is None:  # what the prompt's rows have
                more = tensor[rows:].repeat(edits, *[1] * (tensor.dim() - 1))
            else:
                more = concepts.to(tensor).repeat_interleave(rows, 0)
            return torch.cat([tensor, more])

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

    def after_call(self, unet: torch.nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """Two equal halves: the pipeline's own guidance leaves them as they are."""
        if self.paused:
            return None
        estimates = output[0]
        eps = estimates.unflatten(0, (2 + len(self.text), -1))
        guided = self.guidance(self.steps.index, eps[0], eps[1], eps[2:])
        both = torch.cat([guided, guided])
        return (both, *output[1:]) if isinstance(output, tuple) else type(output)(sample=both)

    def _check(self, given: dict[str, Any]) -> None:
        if not self.pipe.do_classifier_free_guidance:
            _checks.refuse(
                "guidance_scale", "be above 1 for semantic guidance", self.pipe.guidance_scale
            )
        if getattr(self.pipe, "guidance_rescale", 0):
            _checks.refuse(
                "guidance_rescale", "be 0 with semantic guidance", self.pipe.guidance_rescale
            )
        for name in RESIDUALS:
            if given.get(name) is not None:
                _checks.refuse("pipe", "have no ControlNet or adapter with semantic guidance", name)
        if "image_embeds" in (given.get("added_cond_kwargs") or {}):
            _checks.refuse("pipe", "have no IP-Adapter with semantic guidance", "image_embeds")
