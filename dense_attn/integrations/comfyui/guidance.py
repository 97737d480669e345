"""semantic_guidance: concepts turned up or down in the samples of a model of ComfyUI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dense_attn import SemanticGuidance, _checks

from ..edits import Edit as Concept
from ..edits import settings, warn_of_idle
from .models import denoiser_of
from .regions import _tokens


@dataclass(frozen=True, eq=False)
class Edit(Concept):
    """A concept that an image gets more of, or less: diffusers' `Edit` of a CONDITIONING.

    Args:
        prompt: a CONDITIONING of one text, the concept; `conditioning` in the node and in refusals.
        scale, threshold, warmup, cooldown, weight, reverse: as on diffusers.

    Raises:
        ValueError, TypeError: a conditioning breaks the rule that the message names.
    """

    # tensors have no equality of one truth
    __eq__, __hash__ = object.__eq__, object.__hash__

    def __post_init__(self) -> None:
        _tokens("conditioning", self.prompt)


def semantic_guidance(
    model: Any,
    edits: Sequence[Edit],
    *,
    momentum_scale: float = 0.1,
    momentum_beta: float = 0.4,
    backend: str = "auto",
) -> Any:
    """A model whose guided estimates are pushed towards or away from concepts (SEGA).

    The addition of `SemanticGuidance` in `(x - denoised) / sigma`, which is the noise, or a flow's
    velocity, comes on top of what guidance there is (`sampler_post_cfg_function`); each concept is
    estimated beside the prompts. A run begins at its first sigma.

    Args:
        model: a ModelPatcher of any kind, sampled with a negative prompt.
        edits: the concepts, each with a CONDITIONING for its prompt.
        momentum_scale, momentum_beta: how much of the momentum is added, and how much is kept.
        backend: as in `sega_guidance`.

    Returns:
        A clone of the model; the one that is given stays as it is.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023.
    """
    denoiser_of(model)
    options = settings(edits, momentum_scale, momentum_beta, backend, check=_tokens)
    warn_of_idle(edits, 2)
    patched = model.clone()
    added = _Addition(SemanticGuidance(**options), [edit.prompt for edit in edits])
    # at a scale of 1 ComfyUI would leave the negative prompt out
    patched.set_model_sampler_post_cfg_function(added, disable_cfg1_optimization=True)
    return patched


class _Addition:
    """The addition of concepts to a guided estimate, for ComfyUI's sampler_post_cfg_function."""

    def __init__(self, guidance: SemanticGuidance, conditionings: list[list[Any]]) -> None:
        self.guidance, self.conditionings = guidance, conditionings
        self._encoded: tuple[Any, list[Any]] | None = None  # for one model and size of latents

    def __call__(self, args: dict[str, Any]) -> Tensor:
        """The denoised latents with the concepts'."""
        x, denoised, negative = args["input"], args["denoised"], args["uncond_denoised"]
        if args["uncond"] is None:
            _checks.refuse("model", "be sampled with a negative prompt for guidance", None)
        sigma = args["sigma"].flatten()[0]
        # of (x - denoised) / sigma, so that no estimate of the noise is made and taken off again
        towards = [(negative - edit) / sigma for edit in self._estimates(args)]
        nothing = torch.zeros_like(negative)
        added = self.guidance(self._step(args), nothing, nothing, towards)
        return denoised - added.to(x) * sigma

    def _estimates(self, args: dict[str, Any]) -> list[Tensor]:
        """The denoised latents of each concept."""
        import comfy.samplers

        x, model = args["input"], args["model"]
        key = x.shape, x.device, id(model)
        if self._encoded is None or self._encoded[0] != key:
            self._encoded = key, [_encoded(model, one, x) for one in self.conditionings]
        # place 0 is the positive prompt's, which regions would take for theirs
        given = model, [None, *self._encoded[1]], x, args["sigma"], args["model_options"]
        return comfy.samplers.calc_cond_batch(*given)[1:]

    def _step(self, args: dict[str, Any]) -> int:
        """The step of a sigma in its run: the last that is not below it."""
        options = args["model_options"].get("transformer_options", {})
        sigmas = options.get("sample_sigmas")
        if sigmas is None:
            rule = "come with the sigmas of its run (sample_sigmas)"
            _checks.refuse("transformer_options", rule, "nothing of it")
        now = float(args["sigma"].flatten()[0])
        reached = int((sigmas.double() >= now * (1 - 1e-5)).sum())
        return max(reached - 1, 0)


def _encoded(model: Any, conditioning: list[Any], x: Tensor) -> Any:
    """A concept as a model takes it, with latents of the size of x."""
    import comfy.sampler_helpers
    import comfy.samplers

    # as the negative prompt is: no regions, and nothing of the prompt's own
    given = comfy.sampler_helpers.convert_cond(conditioning), x, x.device, "negative"
    return comfy.samplers.encode_model_conds(model.extra_conds, *given)
