"""The concepts of semantic guidance, as its two integrations share them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dense_attn import SemanticGuidance, _checks

if TYPE_CHECKING:
    from dense_attn.sega.vectors import Vectors


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


# the arguments of SemanticGuidance that a concept has
FIELDS = {
    "edit_guidance_scale": "scale",
    "edit_threshold": "threshold",
    "edit_warmup_steps": "warmup",
    "edit_cooldown_steps": "cooldown",
    "edit_weights": "weight",
    "reverse_editing_direction": "reverse",
}


def settings(
    edits: Sequence[Edit],
    momentum_scale: float,
    momentum_beta: float,
    backend: str,
    apply: Vectors | None = None,
) -> dict[str, Any]:
    """The arguments of `SemanticGuidance` that concepts stand for, all of them good.

    With vectors of another run there may be no concepts.
    """
    listed = isinstance(edits, Sequence) and not isinstance(edits, Edit)
    if not listed or not (edits or apply is not None):
        _checks.refuse("edits", "be a list of Edit", repr(edits), TypeError)
    for i, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            _checks.refuse(f"edits[{i}]", "be an Edit", type(edit).__name__, TypeError)
        if not isinstance(edit.prompt, str):
            got = type(edit.prompt).__name__
            _checks.refuse(f"edits[{i}].prompt", "be a string", got, TypeError)
        with _checks.renamed({name: f"edits[{i}].{field}" for name, field in FIELDS.items()}):
            SemanticGuidance(**{name: [getattr(edit, field)] for name, field in FIELDS.items()})
    own = {name: [getattr(edit, field) for edit in edits] for name, field in FIELDS.items()}
    others = {"edit_momentum_scale": momentum_scale, "edit_mom_beta": momentum_beta}
    options = {**own, **others, "backend": backend, "apply": apply}
    names = {"edit_momentum_scale": "momentum_scale", "edit_mom_beta": "momentum_beta"}
    with _checks.renamed(names):
        SemanticGuidance(**options)
    return options


def warn_of_idle(edits: Sequence[Edit], level: int) -> None:
    """Name each concept that can act in no run; `level` frames up stands the user's line."""
    for i, edit in enumerate(edits):
        if edit.cooldown is not None and edit.cooldown <= edit.warmup:
            rule = f"be above its warmup of {edit.warmup} for the concept to act"
            text = f"edits[{i}].cooldown must {rule}, got {edit.cooldown}"
            warnings.warn(text, stacklevel=level + 1)
        if edit.weight < 0:
            rule = "be above 0 for the concept to act (reverse=True turns away from it)"
            text = f"edits[{i}].weight must {rule}, got {edit.weight}"
            warnings.warn(text, stacklevel=level + 1)


class Runs:
    """Semantic guidance of one run after the other, by the same concepts."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options  # arguments of SemanticGuidance
        self.guidance = SemanticGuidance(**options)
        self._steps = 0  # of the run before
        self._told: set[int] = set()  # concepts that a run was too short for

    def begin(self, steps: int) -> SemanticGuidance:
        """Guidance that knows of no step yet; a concept that begins too late is named once."""
        if self.options["apply"] is not None:
            recorded = max(step for step, _ in self.options["apply"]) + 1
            if recorded != steps:
                rule = f"be of a run of as many steps, {steps}"
                _checks.refuse("apply", rule, recorded)
        for i, warmup in enumerate(self.options["edit_warmup_steps"]):
            if warmup > steps - 1 and i not in self._told:
                self._told.add(i)
                last = f"{steps - 1}, the last of the run's {steps} steps"
                text = f"edits[{i}].warmup must be at most {last}, for the concept to act"
                warnings.warn(f"{text}, got {warmup}", stacklevel=3)
        recorded = self.guidance.recorded
        if recorded and recorded[-1][0] + 1 < self._steps:  # that run broke off
            recorded.clear()
        self._steps = steps
        self.guidance.reset()
        return self.guidance
