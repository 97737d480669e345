"""One step of semantic guidance: the public op, its autograd and dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dense_attn import _checks, _memory, reference
from dense_attn._backends import dispatch, plans, raw_checks, table
from dense_attn.sega import inputs


def sega_guidance(
    eps_uncond: Tensor,  # [B, C, ...]
    eps_text: Tensor,  # [B, C, ...]
    eps_edits: Tensor | Sequence[Tensor],  # [E, B, C, ...], or E of [B, C, ...]
    momentum: Tensor | None,  # [B, C, ...]
    *,
    guidance_scale: float,
    edit_guidance_scale: float | Sequence[float],  # one value, or E, as for those below
    edit_threshold: float | Sequence[float],
    edit_weights: float | Sequence[float],
    warm: bool | Sequence[bool],
    enabled: bool | Sequence[bool],
    reverse: bool | Sequence[bool],
    edit_momentum_scale: float,
    edit_mom_beta: float,
    user_mask: Tensor | None = None,  # broadcastable to [E, B, C, ...]
    sum_channels: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of semantic guidance: the noise estimate pushed towards or away from edit concepts.

    There may be any number of concepts. For each concept e:
    `d = ±edit_guidance_scale*(eps_edit - eps_uncond)`, minus where `reverse`; of each sample and
    channel what is below `quantile(|d|, edit_threshold)` is set to 0. With w the weights, 0 where
    negative or not `enabled`,

    - `steer = sum_e w_e*d_e + edit_momentum_scale*momentum`,
    - `momentum <- edit_mom_beta*momentum + (1 - edit_mom_beta)*steer`,
    - `eps = eps_uncond + guidance_scale*(eps_text - eps_uncond) + addition`, where the addition is
      `steer` once every concept is `warm`, `sum w_e*d_e / sum w_e` over the warm ones while only
      some are (0 where no weight is left), and 0 while none is.

    With `edit_threshold = 0` every entry is kept: composable diffusion, and weighted negative
    prompting with `reverse`.

    Args:
        eps_uncond, eps_text: `[B, C, ...]` of one shape and dtype: float32, bfloat16, float16 or
            float64; any strides, copied only where the axes after C do not collapse to one
            (contiguous and channels_last ones do).
        eps_edits: `[E, B, C, ...]`, taken as it is, or a sequence of E tensors `[B, C, ...]`, which
            is stacked.
        momentum: what the step before returned; None is 0. In eps' dtype or the dtype it is
            returned in.
        guidance_scale, edit_momentum_scale, edit_mom_beta: numbers.
        edit_guidance_scale, edit_threshold (0 to 1), edit_weights, warm, enabled, reverse: one
            value, or E.
        user_mask: bool, or in a dtype that momentum may have; multiplies d after the thresholds
            have been found without it (LEDITS++'s first mask). Copied to `[E, B, C, ...]` where its
            expanded last axes do not collapse.
        sum_channels: thresholds on the sum of |d| over the channels, one for each sample
            (LEDITS++'s second mask).
        backend: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`; a named one runs or
            raises.

    Returns:
        `(eps, momentum)`: contiguous, eps in its own dtype, momentum float32 (float64 for float64).
        Differentiable in every tensor through the kept entries, any number of times; thresholds
        count as constants. A NaN in eps_edits or eps_uncond leaves nothing kept of its row.

    Raises:
        ValueError, TypeError: an argument breaks the rule that the message names.
        RuntimeError: the named backend cannot run this call, with every reason.

    Source: Brack et al., SEGA: Instructing Text-to-Image Models using Semantic Guidance, NeurIPS
    2023; Brack et al., LEDITS++: Limitless Image Editing using Text-to-Image Models, CVPR 2024.

    Example:
        >>> import torch, dense_attn
        >>> uncond, text, smile, hat = torch.randn(4, 1, 4, 64, 64)
        >>> eps, momentum = dense_attn.sega_guidance(
        ...     uncond, text, [smile, hat], None, guidance_scale=7.5, edit_guidance_scale=5.0,
        ...     edit_threshold=[0.9, 0.95], edit_weights=1.0, warm=True, enabled=True,
        ...     reverse=[False, True], edit_momentum_scale=0.1, edit_mom_beta=0.4,
        ... )
        >>> eps.shape
        torch.Size([1, 4, 64, 64])
    """
    given = Tensors(eps_uncond, eps_text, eps_edits, momentum, user_mask)
    plan = planned(given, backend)
    if plan is None:
        given = given._replace(edits=inputs.estimates(eps_uncond, eps_text, eps_edits))
    count, wide = len(given.edits), reference.accumulation_dtype(eps_uncond.dtype)
    number, fraction, flag = inputs.number_of(wide), _checks.fraction, _checks.flag
    concepts = reference.sega_weights(
        inputs.each("edit_weights", edit_weights, number, count),
        inputs.each("warm", warm, flag, count),
        inputs.each("enabled", enabled, flag, count),
    )
    return guided(
        given,
        (
            _checks.number("guidance_scale", guidance_scale, wide),
            inputs.each("edit_guidance_scale", edit_guidance_scale, number, count),
            inputs.each("edit_threshold", edit_threshold, fraction, count),
            *concepts,
            inputs.each("reverse", reverse, flag, count),
            _checks.number("edit_momentum_scale", edit_momentum_scale, wide),
            _checks.number("edit_mom_beta", edit_mom_beta, wide),
            _checks.flag("sum_channels", sum_channels),
        ),
        backend,
        plan,
    )


class Tensors(NamedTuple):
    """A step's tensors, which are right."""

    eps_uncond: Tensor  # [B, C, ...]
    eps_text: Tensor  # [B, C, ...]
    edits: Tensor  # [E, B, C, ...]
    momentum: Tensor | None  # [B, C, ...]
    user_mask: Tensor | None  # broadcastable to [E, B, C, ...]


class Plan(NamedTuple):
    """The consequences of a call's form."""

    backend: str
    whole: bool  # whether kernels take its tensors as they are


_plans: plans.Plans[Plan] = plans.Plans()


def planned(given: Tensors, backend: str) -> Plan | None:
    """The plan of a step on tensors of a form that was let through, all of them; else None."""
    return _plans.get(_form(given, backend))


def _form(given: Tensors, backend: str) -> plans.Form | None:
    """The form of a step, which has all that the checks look at in tensors; None in a graph, and
    where edits are not one tensor yet.
    """
    if torch.compiler.is_compiling():
        return None
    look = plans.look
    eps_uncond, eps_text, edits, momentum, mask = given
    try:
        return (
            look(eps_uncond),
            look(eps_text),
            look(edits),
            momentum if momentum is None else (look(momentum), momentum.stride()),
            mask if mask is None else (look(mask), mask.stride()),
            eps_uncond.stride(),
            eps_text.stride(),
            edits.stride(),
            backend,
        )
    except (AttributeError, RuntimeError):  # sparse ones have no strides
        return None


def guided(
    given: Tensors, options: tuple[object, ...], backend: str, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    """The step on options that are right, in the order of a raw call."""
    eps_uncond, eps_text, edits, momentum, user_mask = given
    plan = plan or planned(given, backend)
    ready = plan is not None and plan.whole
    try:
        if momentum is None or not ready:
            momentum = inputs.wide_momentum(momentum, eps_uncond)
        if not ready:
            user_mask = inputs.wide_mask(user_mask, eps_uncond, edits.shape)
        tensors = Tensors(eps_uncond, eps_text, edits, momentum, user_mask)
        if plan is None:
            plan = _plan(given, tensors, backend)
        if plan.whole and not dispatch.is_recorded(*tensors):
            return _SegaGuidance.forward(*tensors, *options, plan.backend)[:2]
        tensors = (
            inputs.rows(eps_uncond, 2),  # [B, C, N]
            inputs.rows(eps_text, 2),
            inputs.rows(edits, 3),
            inputs.rows(momentum, 2),
            None if user_mask is None else inputs.rows(user_mask, 3),
        )
        eps, momentum, _ = dispatch.run(_SegaGuidance, *tensors, *options, plan.backend)
    except RuntimeError as error:
        shown = {"eps_uncond": eps_uncond, "eps_edits": edits}
        _memory.explain(error, "sega_guidance", eps_uncond.nbytes, **shown)
        raise
    return eps.reshape_as(eps_uncond), momentum.reshape_as(eps_uncond)


def _plan(given: Tensors, wide: Tensors, backend: str) -> Plan:
    """The plan of a step that the checks let through, which is kept for those of its form; wide:
    the step in the dtypes of kernels.
    """
    name, form = table.resolve(backend, "sega_guidance", given.eps_uncond), _form(given, backend)
    rest = given.eps_uncond.dim() - 2  # axes after the channels
    whole = (
        form is not None
        and (given.momentum is None or given.momentum is wide.momentum)
        and given.user_mask is wide.user_mask
        and all(x is None or raw_checks.collapses(x, x.dim() - rest) for x in wide)
    )
    return _plans.keep(form, Plan(name, whole), *given)


def parts(
    given: Tensors, options: tuple[object, ...], backend: str
) -> tuple[Tensor | None, Tensor]:
    """The addition to classifier-free guidance, None where there is none, and the momentum after.

    Both are in the wide dtype. The addition is the momentum of a step that keeps none of the old.
    """
    _, scales, thresholds, weights, partials, all_warm, reverse, rate, beta, summed = options
    none = [0.0] * len(weights)
    if not all_warm:  # what is added and what the momentum takes have other weights
        after = guided(given, options, backend)[1]
        if not any(partials):
            return None, after
        alone = (1.0, scales, thresholds, partials, none, True, reverse, 0.0, 0.0, summed)
        return guided(given._replace(momentum=None), alone, backend)[1], after
    alone = (1.0, scales, thresholds, weights, none, True, reverse, rate, 0.0, summed)
    added = guided(given, alone, backend)[1]
    kept = added * (1 - beta)
    return added, kept if given.momentum is None else kept + beta * given.momentum


def moved(
    eps_uncond: Tensor,
    eps_text: Tensor,
    addition: Tensor | None,  # in the wide dtype
    options: tuple[object, ...],
    backend: str,
) -> Tensor:
    """Classifier-free guidance and an addition, rounded once: a step without concepts adds it."""
    none: list[float] = []
    added = (options[0], none, none, none, none, True, none, 1.0, 0.0, False)
    edits = eps_uncond.new_empty((0, *eps_uncond.shape))
    given = Tensors(eps_uncond, eps_text, edits, addition, None)
    return guided(given, added, backend)[0]


class _SegaGuidance(torch.autograd.Function):
    generate_vmap_rule = True
    num_tensors = 5

    @staticmethod
    def forward(
        eps_uncond: Tensor,
        eps_text: Tensor,
        eps_edits: Tensor,
        momentum: Tensor,
        user_mask: Tensor | None,
        guidance_scale: float,
        edit_guidance_scale: list[float],
        edit_threshold: list[float],
        weights: list[float],
        partials: list[float],
        all_warm: bool,
        reverse: list[bool],
        edit_momentum_scale: float,
        edit_mom_beta: float,
        sum_channels: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = eps_uncond, eps_text, eps_edits, momentum
        run = dispatch.kernel_of(backend, "sega_guidance", (*tensors, user_mask), ())
        return run(
            *tensors,
            guidance_scale=guidance_scale,
            edit_guidance_scale=edit_guidance_scale,
            edit_threshold=edit_threshold,
            weights=weights,
            partials=partials,
            all_warm=all_warm,
            reverse=reverse,
            edit_momentum_scale=edit_momentum_scale,
            edit_mom_beta=edit_mom_beta,
            user_mask=user_mask,
            sum_channels=sum_channels,
        )

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # noqa: ANN001
        eps_uncond, _, eps_edits, _, user_mask, *ctx.options, _ = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(eps_uncond, eps_edits, user_mask, output[2])

    @staticmethod
    def backward(ctx, grad_eps, grad_momentum, _):  # noqa: ANN001, ANN205
        """The transpose of a step that is linear, but in user_mask, given the kept entries."""
        eps_uncond, eps_edits, user_mask, thresholds = ctx.saved_tensors
        guidance_scale, scales, _, weights, partials, all_warm, reverse = ctx.options[:7]
        momentum_scale, beta, sum_channels = ctx.options[7:]
        steered = reference.sega_differences(
            eps_uncond.to(thresholds.dtype), eps_edits.to(thresholds.dtype), scales, reverse
        )
        kept = reference.sega_magnitudes(steered, sum_channels) >= thresholds.unsqueeze(-1)
        flow = grad_eps.to(thresholds.dtype)
        grad_steer = (1 - beta) * grad_momentum + (flow if all_warm else 0)
        grads = [weight * grad_steer + partial * flow for weight, partial in zip(weights, partials)]
        grads = torch.stack(grads) if grads else torch.zeros_like(steered)  # [E, B, C, N]
        grads = torch.where(kept, grads, 0)
        grad_mask = grads * torch.where(kept, steered, 0) if ctx.needs_input_grad[4] else None
        if user_mask is not None:
            grads = grads * user_mask
        grad_edits = reference.sega_differences(torch.zeros_like(flow), grads, scales, reverse)
        grad_uncond = (1 - guidance_scale) * flow - grad_edits.sum(0)
        grads = (x.to(eps_uncond.dtype) for x in (grad_uncond, guidance_scale * flow, grad_edits))
        return *grads, beta * grad_momentum + momentum_scale * grad_steer, grad_mask, *[None] * 11
