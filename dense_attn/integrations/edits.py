"""Concepts of semantic guidance, as every integration takes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
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

    prompt: Any
    scale: float = 5.0
    threshold: float = 0.9
    warmup: float = 10
    cooldown: float | None = None
    weight: float = 1.0
    reverse: bool = False


def check_words(name: str, prompt: Any) -> None:
    """Refuse a concept that is not a string."""
    if not isinstance(prompt, str):
        _checks.refuse(name, "be a string", type(prompt).__name__, TypeError)


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
    check: Callable[[str, Any], object] = check_words,  # of a name and a concept's prompt
) -> dict[str, Any]:
    """The arguments of `SemanticGuidance` that concepts stand for, all of them good.

    With vectors of another run there may be no concepts.
    """
    listed = isinstance(edits, Sequence) and not isinstance(edits, Edit)
    if not listed or not (edits or apply is not None):
        got = "none" if listed else type(edits).__name__
        _checks.refuse("edits", "be a list of Edit", got, TypeError)
    for i, edit in enumerate(edits):
        if not isinstance(edit, Edit):
            _checks.refuse(f"edits[{i}]", "be an Edit", type(edit).__name__, TypeError)
        check(f"edits[{i}].prompt", edit.prompt)
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
