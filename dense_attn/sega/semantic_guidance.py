"""Semantic guidance over a whole sampling loop: the momentum and the rules of the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dense_attn import _checks, reference
from dense_attn._backends import table
from dense_attn.sega import inputs, op, vectors


class _Lists(NamedTuple):
    """The options that concepts have of their own, one value for each."""

    scales: list[float]
    thresholds: list[float]
    weights: list[float]
    warmups: list[float]
    cooldowns: list[float | None]
    reverse: list[bool]
    ends: list[float]  # of warm-ups and cool-downs


class SemanticGuidance:
    """Semantic guidance over whole sampling loops: the momentum, and who is warm at which step.

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
        apply: the guidance vectors of another run, from its `record()`, that each step adds to its
            own; a call may then have no concepts. They belong to the noise that run began with.

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
        >>> vectors = guidance.record()
        >>> for step in range(3):
        ...     uncond, text, smile, hat = torch.randn(4, 1, 4, 64, 64)  # of the U-Net
        ...     eps = guidance(step, uncond, text, [smile, hat])  # for the scheduler
        >>> other = dense_attn.SemanticGuidance(apply=vectors)
        >>> eps = other(0, uncond, text)  # another prompt's, from the same noise
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
        apply: vectors.Vectors | None = None,
    ) -> None:
        number, flag = _checks.number, _checks.flag
        weights = 1.0 if edit_weights is None else edit_weights
        self._values = {
            name: inputs.values(name, value, check)
            for name, value, check in (
                ("edit_guidance_scale", edit_guidance_scale, number),
                ("edit_threshold", edit_threshold, _checks.fraction),
                ("edit_weights", weights, number),
                ("edit_warmup_steps", edit_warmup_steps, _steps),
                ("edit_cooldown_steps", edit_cooldown_steps, _steps_or_none),
                ("reverse_editing_direction", reverse_editing_direction, flag),
            )
        }
        self.guidance_scale = number("guidance_scale", guidance_scale)
        self._momentum_scale = number("edit_momentum_scale", edit_momentum_scale)
        self._mom_beta = number("edit_mom_beta", edit_mom_beta)
        self._sum_channels = flag("sum_channels", sum_channels)
        self._backend = _checks.choice("backend", backend, ("auto", *table.ORDER))
        self._beyond_float32 = self._large_numbers()
        self._apply = vectors.by_step("apply", apply)
        self.recorded: vectors.Vectors | None = None  # what the calls fill
        self._kept_on: torch.device | None = None
        self._lists: dict[int, _Lists] = {}
        self._eras: dict[tuple[int, int], tuple[object, ...]] = {}
        self.reset()

    def _large_numbers(self) -> list[tuple[str, float]]:
        """The numbers that only float64 holds: a call on other estimates refuses them."""
        numbers = [
            ("edit_momentum_scale", self._momentum_scale),
            ("edit_mom_beta", self._mom_beta),
        ]
        for name in ("edit_guidance_scale", "edit_weights"):
            values = self._values[name]
            numbers += [(name, one) for one in (values if isinstance(values, tuple) else [values])]
        largest = _checks.LARGEST[torch.float32]
        return [(name, number) for name, number in numbers if abs(number) > largest]

    def __call__(
        self,
        step: int,
        eps_uncond: Tensor,  # [B, C, ...]
        eps_text: Tensor,  # [B, C, ...]
        eps_edits: Tensor | Sequence[Tensor] = (),  # [E, B, C, ...], or E of [B, C, ...]
        *,
        user_mask: Tensor | None = None,  # broadcastable to [E, B, C, ...]
    ) -> Tensor:
        """The guided estimate of step 0, 1, ... of a run, [B, C, ...]; the momentum moves on."""
        return self._step(step, eps_uncond, eps_text, eps_edits, user_mask, None)

    def steer(
        self,
        step: int,
        eps: Tensor,  # [B, C, ...]
        eps_base: Tensor,  # [B, C, ...]
        eps_edits: Tensor | Sequence[Tensor] = (),  # [E, B, C, ...], or E of [B, C, ...]
        *,
        user_mask: Tensor | None = None,  # broadcastable to [E, B, C, ...]
    ) -> Tensor:
        """An estimate of any guidance, eps, with the concepts' directions from eps_base added.

        It is a step of the run as a call is, without a guidance of its own: where nothing is added
        the result is eps itself.
        """
        with _checks.renamed({"eps_uncond": "eps_base"}):
            return self._step(step, eps_base, eps_base, eps_edits, user_mask, eps)

    def _step(
        self,
        step: int,
        eps_uncond: Tensor,
        eps_text: Tensor,
        eps_edits: Tensor | Sequence[Tensor],
        user_mask: Tensor | None,
        guided: Tensor | None,
    ) -> Tensor:
        if isinstance(step, bool) or not isinstance(step, (int, np.integer)):
            _checks.refuse("step", "be an int", type(step).__name__, TypeError)
        if step < 0:
            _checks.refuse("step", "be at least 0", step)
        momentum = None if step == 0 or step < self._last else self.momentum
        given = op.Tensors(eps_uncond, eps_text, eps_edits, momentum, user_mask)
        plan = op.planned(given, self._backend)
        if plan is None:
            given = given._replace(edits=inputs.estimates(eps_uncond, eps_text, eps_edits))
        if guided is not None:
            _checks.like("eps", guided, eps_uncond, "eps_base")
        if plan is None:
            _check_momentum(momentum, eps_uncond)
        call = self._call + 1 if momentum is not None and step == self._last else 0
        applied = vectors.applied("apply", self._apply, int(step), call, eps_uncond)
        count = len(given.edits)  # a number in a trace too
        options = self._options(step, count, reference.accumulation_dtype(eps_uncond.dtype))
        if momentum is None and self.recorded:  # of the run before
            self.recorded = None
        idle = count == 0 and (momentum is None or self._idle)
        if guided is None and self.recorded is None and applied is None:
            eps, after = op.guided(given, options, self._backend, plan)
        else:
            added, after = op.parts(given, options, self._backend)
            added = vectors.total(None if idle else added, applied)
            if guided is not None and added is None:  # a sum would lose -0.0 and inf
                eps = guided
            else:
                pair = (eps_uncond, eps_text) if guided is None else (guided, guided)
                eps = op.moved(*pair, added, options, self._backend)
            if self.recorded is not None:
                self.recorded.append((int(step), vectors.kept(added, self._kept_on)))
        self.momentum, self._last, self._call, self._idle = after, int(step), call, idle
        return eps

    def _options(self, step: int, count: int, wide: torch.dtype) -> tuple[object, ...]:
        """The options of a step of a number of concepts, in the order of a raw call."""
        for name, number in self._beyond_float32:
            _checks.number(name, number, wide)
        lists = self._lists.get(count) or self._spread(count)
        scale = _checks.number("guidance_scale", self.guidance_scale, wide)
        # Which of them are over follows from how many are.
        era = count, sum([end <= step for end in lists.ends])
        return (scale, *(self._eras.get(era) or self._of_era(era, step, lists)))

    def _of_era(self, era: tuple[int, int], step: int, lists: _Lists) -> tuple[object, ...]:
        """The options behind guidance_scale, kept for the steps of an era."""
        options = (
            lists.scales,
            lists.thresholds,
            *reference.sega_weights(
                lists.weights,
                [step >= first for first in lists.warmups],
                [end is None or step < end for end in lists.cooldowns],
            ),
            lists.reverse,
            self._momentum_scale,
            self._mom_beta,
            self._sum_channels,
        )
        if not torch.compiler.is_compiling():  # what a graph keeps, the next one is guarded by
            self._eras[era] = options
        return options

    def record(self, device: torch.device | str | None = None) -> vectors.Vectors:
        """A list that the calls of a run fill, each with its step and its guidance vector.

        The vector [B, C, ...] is what a step adds to classifier-free guidance, float32 (float64 for
        float64), or None where nothing is added. It holds the next run, or the rest of one that has
        begun, and `SemanticGuidance(apply=...)` adds it to another: to the run that it is from it
        gives the same bits. A recorded run is like one that is not, but for rounding in steps that
        add several concepts while another warms up.

        A run of a pipeline that breaks off before its last step is not kept: the list is emptied
        when the next one begins, and holds that. In a loop of your own, which says nothing of its
        last step, call `record()` again.

        Args:
            device: where vectors are kept; None: where the estimates are.

        Raises:
            ValueError, TypeError: no such device is here.
        """
        self._kept_on = vectors.place("device", device)
        self.recorded = []
        return self.recorded

    def _spread(self, count: int) -> _Lists:
        """The options of a number of concepts, kept for the steps that follow."""
        lists = [inputs.spread(*named, count) for named in self._values.items()]
        *_, warmups, cooldowns, _ = lists
        lists = _Lists(*lists, warmups + [end for end in cooldowns if end is not None])
        self._lists[count] = lists
        return lists

    def reset(self) -> None:
        """Forget the momentum: the next call begins another run, whatever its step."""
        self.momentum: Tensor | None = None
        self._last = 0  # the step of the last call
        self._call = 0  # calls of that step before it
        self._idle = False  # whether no call of the run had a concept


def _check_momentum(momentum: Tensor | None, eps: Tensor) -> None:
    if momentum is None or _kept_as(momentum) == _kept_as(eps):
        return
    was, now = (
        f"{shape} in {_checks.name(dtype)} on {device}"
        for shape, dtype, device in map(_kept_as, (momentum, eps))
    )
    rule = f"go with the momentum of the steps before, {was}, or reset() come first"
    _checks.refuse("eps_uncond", rule, now)


def _kept_as(x: Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    """The shape, dtype and device of an estimate's momentum, or of a momentum."""
    return tuple(x.shape), reference.accumulation_dtype(x.dtype), x.device


def _steps(argument: str, value: object) -> float:
    if _checks.number(argument, value) < 0:
        _checks.refuse(argument, "be at least 0", value)
    return value


def _steps_or_none(argument: str, value: object) -> float | None:
    return None if value is None else _steps(argument, value)
