"""Semantic guidance over a whole sampling loop: the momentum and the step rules, on top of
sega_guidance.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from dense_attn import _checks, reference
from dense_attn._backends import table
from dense_attn.sega import op


class SemanticGuidance:
    """Semantic guidance over whole sampling loops: keeps the momentum, and knows who is warm at
    which step.

    Every call is one step of `sega_guidance` with `warm = step >= edit_warmup_steps`,
    `enabled = step < edit_cooldown_steps` and the momentum of the call before (0 at first): the
    rules and the names of diffusers' SemanticStableDiffusionPipeline. Where that divides 0 by 0
    (all warm concepts are without weight while another warms up) nothing is added.

    A run begins at step 0, or at a step below that of the call before, as the next image's of
    img2img: its momentum is 0 at first. Later steps may be called twice, as by schedulers that call
    the network twice a step; the momentum goes on.
    Where steps do not tell, as after a run that broke off, `reset()` does.

    Args:
        guidance_scale: classifier-free guidance.
        edit_guidance_scale: how strongly a concept pulls.
        edit_threshold: 0 to 1, the share of entries that a concept leaves alone; 0 is composable
            diffusion.
        edit_warmup_steps, edit_cooldown_steps: the steps, from 0, at which a concept begins and
            ends; None: no end.
        edit_weights: what concepts weigh against each other; None is 1 for each, negative ones
            count as 0.
        reverse_editing_direction: away from a concept, not towards it.
        edit_momentum_scale, edit_mom_beta: how much of the momentum is added, and how much of it is
            kept.
        sum_channels: thresholds over all channels together, as in `sega_guidance`.
        backend: as in `sega_guidance`.

    All from edit_guidance_scale to reverse_editing_direction are one value for all concepts, or a
    sequence of one for each. The attribute `momentum` is None before the first step; it carries
    gradients from step to step, and may be set to that of another object to go on where that
    stopped, on a new object or after `reset()`.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023.

    Example:
        >>> import torch, dense_attn
        >>> guidance = dense_attn.SemanticGuidance(edit_threshold=[0.9, 0.95], edit_warmup_steps=1)
        >>> for step in range(3):
        ...     uncond, text, smile, hat = torch.randn(4, 1, 4, 64, 64)  # of the U-Net
        ...     eps = guidance(step, uncond, text, [smile, hat])  # for the scheduler
    """

    def __init__(
        self,
        *,
        guidance_scale: float = 7.5,
        edit_guidance_scale: float | Sequence[float] = 5.0,
        edit_threshold: float | Sequence[float] = 0.9,
        edit_warmup_steps: float | Sequence[float] = 10,
        edit_cooldown_steps: float | Sequence[float | None] | None = None,
        edit_weights: float | Sequence[float] | None = None,
        reverse_editing_direction: bool | Sequence[bool] = False,
        edit_momentum_scale: float = 0.1,
        edit_mom_beta: float = 0.4,
        sum_channels: bool = False,
        backend: str = "auto",
    ) -> None:
        each = {
            "edit_guidance_scale": (edit_guidance_scale, _checks.number),
            "edit_threshold": (edit_threshold, _checks.fraction),
            "edit_warmup_steps": (edit_warmup_steps, _steps),
            "edit_cooldown_steps": (edit_cooldown_steps, _steps_or_none),
            "edit_weights": (1.0 if edit_weights is None else edit_weights, _checks.number),
            "reverse_editing_direction": (reverse_editing_direction, _checks.flag),
        }
        self._each = {name: op.values(name, value, check) for name, (value, check) in each.items()}
        self.guidance_scale = _checks.number("guidance_scale", guidance_scale)
        self._options = {
            "edit_momentum_scale": _checks.number("edit_momentum_scale", edit_momentum_scale),
            "edit_mom_beta": _checks.number("edit_mom_beta", edit_mom_beta),
            "sum_channels": _checks.flag("sum_channels", sum_channels),
            "backend": _checks.choice("backend", backend, ("auto", *table.ORDER)),
        }
        self.reset()

    def __call__(
        self,
        step: int,
        eps_uncond: Tensor,  # [B, C, ...]
        eps_text: Tensor,  # [B, C, ...]
        eps_edits: Tensor | Sequence[Tensor],  # [E, B, C, ...], or E of [B, C, ...]
        *,
        user_mask: Tensor | None = None,  # broadcastable to [E, B, C, ...]
    ) -> Tensor:
        """The guided noise estimate of step 0, 1, ... of a run, [B, C, ...]; the momentum moves
        on.
        """
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
            _checks.refuse("step", "be an int", type(step).__name__, TypeError)
        _steps("step", step)
        edits = op.check_eps(eps_uncond, eps_text, eps_edits)
        momentum = None if step == 0 or step < self._last else self.momentum
        _check_momentum(momentum, eps_uncond)
        each = {
            name: op.spread(name, values, edits.shape[0]) for name, values in self._each.items()
        }
        warmups, cooldowns = each.pop("edit_warmup_steps"), each.pop("edit_cooldown_steps")
        eps, self.momentum = op.sega_guidance(
            eps_uncond,
            eps_text,
            edits,
            momentum,
            warm=[step >= first for first in warmups],
            enabled=[end is None or step < end for end in cooldowns],
            reverse=each.pop("reverse_editing_direction"),
            user_mask=user_mask,
            **each,
            guidance_scale=self.guidance_scale,
            **self._options,
        )
        self._last = int(step)
        return eps

    def reset(self) -> None:
        """Forget the momentum: the next call begins another run, whatever its step."""
        self.momentum: Tensor | None = None
        self._last = 0  # the step of the last call


def _check_momentum(momentum: Tensor | None, eps: Tensor) -> None:
    if momentum is None:
        return
    was, now = (
        (tuple(x.shape), reference.accumulation_dtype(x.dtype), x.device) for x in (momentum, eps)
    )
    if was != now:
        was, now = (
            f"{shape} in {_checks.name(dtype)} on {device}" for shape, dtype, device in (was, now)
        )
        _checks.refuse(
            "eps_uncond",
            f"go with the momentum of the steps before, {was}, or reset() come first",
            now,
        )


def _steps(argument: str, value: object) -> float:
    if _checks.number(argument, value) < 0:
        _checks.refuse(argument, "be at least 0", value)
    return value


def _steps_or_none(argument: str, value: object) -> float | None:
    return None if value is None else _steps(argument, value)
