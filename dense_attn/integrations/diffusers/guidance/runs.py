"""Semantic guidance of one run after the other, as a pipeline's two kinds of denoisers share it."""

from __future__ import annotations

import warnings
from typing import Any

from dense_attn import SemanticGuidance, _checks


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
