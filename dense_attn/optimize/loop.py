"""Optimisation of the noise that a chain starts from: DOODL's loop, with SGOOL's loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import NoneType

import torch
from torch import Tensor

from dense_attn import _checks, _progress
from dense_attn.optimize import latent_state
from dense_attn.optimize.image_loss import ImageLoss, NotFiniteError, require_finite
from dense_attn.optimize.latent_state import State
from dense_attn.reversible.sampler import ReversibleSampler


@dataclass(frozen=True, repr=False)
class OptimizeResult:
    """The latents that `optimize_latents` found; `losses[i]` is the loss before update i.

    Attributes:
        latents: the latents to sample from, as x; a pair where `tie=False` lets the two part.
        losses: the loss of each step, all steps of a resumed run included.
        state: give it back as `state=` to go on exactly from `latents`; a dict of tensors and
            numbers, which `torch.save` writes and `torch.load(..., weights_only=True)` reads, on
            this machine or another that has the generator's kind of device.
        message: why the run stopped early; empty when it did not.

    Example:
        >>> import tempfile, torch, dense_attn
        >>> alphas = torch.linspace(0.999, 0.01, 1000)
        >>> sampler = dense_attn.ReversibleSampler(alphas, [750, 500, 250])
        >>> def loss_fn(image): return (image - 0.5).square().mean()
        >>> arguments = sampler, lambda x, t: 0.1 * x, torch.tanh, loss_fn, torch.zeros(1, 3, 8, 8)
        >>> result = dense_attn.optimize_latents(*arguments, steps=2, progress=False)
        >>> result
        OptimizeResult(2 steps, loss 0.25 to 0.25, latents (1, 3, 8, 8) in float32)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save(result.state, f"{folder}/state.pt")
        ...     state = torch.load(f"{folder}/state.pt", weights_only=True)
        >>> dense_attn.optimize_latents(*arguments, steps=1, state=state, progress=False)
        OptimizeResult(3 steps, loss 0.25 to 0.25, latents (1, 3, 8, 8) in float32)
    """

    latents: Tensor | tuple[Tensor, Tensor]
    losses: list[float]
    state: State
    message: str = ""

    def __repr__(self) -> str:
        pair = self.latents if isinstance(self.latents, tuple) else (self.latents,)
        parts = [f"{self.state['step']} step{'s' * (self.state['step'] != 1)}"]
        if self.losses:
            ends = dict.fromkeys((0, len(self.losses) - 1))  # one where they are the same
            parts.append("loss " + " to ".join(f"{self.losses[i]:.4g}" for i in ends))
        count = "" if len(pair) == 1 else f"{len(pair)} "
        parts.append(f"{count}latents {tuple(pair[0].shape)} in {_checks.name(pair[0].dtype)}")
        return f"OptimizeResult({', '.join(parts + [repr(self.message)] * bool(self.message))})"


def optimize_latents(
    sampler: ReversibleSampler,
    eps_fn: Callable[[Tensor, object], Tensor],
    decode_fn: Callable[[Tensor], Tensor],
    loss_fn: Callable[[Tensor], Tensor],
    x: Tensor,  # [B, ...]
    *,
    steps: int = 50,
    saliency_fn: Callable[[Tensor], Tensor] | None = None,
    salient_weight: float = 1.0,
    clip: float | None = 1e-3,
    momentum: float | None = 0.9,
    noise: float | None = 1e-4,
    renormalize: bool = True,
    tie: bool = True,
    generator: torch.Generator | None = None,
    progress: bool = True,
    state: State | None = None,
) -> OptimizeResult:
    """Change the noise x until its image has a lower loss, by gradients through the whole chain.

    With `a, b` the latents sampled from the pair `(x, y)`, x = y at first, every step does
    `g = -(1/2) d(loss(decode(a)) + loss(decode(b))) / d(x, y)`, averaged over x and y when tied,
    `g = clamp(g, -clip, clip)`, `m = momentum*m + g`, `x = x + m + noise*randn`, and scales each
    sample of x back to its first norm; the loss reported is the mean of the two. With a saliency_fn
    the loss of an image is `loss(image) + salient_weight*loss(crop)`, where the crop is the box
    around the image's salient part (the pixels halfway or more from the map's mean to its maximum)
    resized to the image's size. A sampler other than EDICT keeps no two latents of one time: x
    alone is optimised, and `g = -d loss(decode(a)) / dx`.

    Args:
        sampler: a `ReversibleSampler`; its memory does not grow with its steps.
        eps_fn: `eps_fn(latents, t) -> eps`, as the sampler takes it; its parameters get no
            gradient.
        decode_fn: latents (x's shape; float32 for a half-precision x) to images, differentiable.
            With a saliency_fn images are `[B, C, H, W]` in -1..1, as a VAE decodes them.
        loss_fn: images to a scalar tensor.
        x: `[B, ...]`, finite; half precision is optimised in float32, since it does not resolve the
            steps.
        steps: how many steps, at least 0; further steps when resumed.
        saliency_fn: images in 0..1, detached, to maps `[B, H, W]`; None is DOODL, any is SGOOL
            (`spectral_residual_saliency`).
        salient_weight: weight of the crop's loss.
        clip: largest element of a gradient, above 0; None for no limit.
        momentum: in 0..1, 1 excluded; 0 or None for none.
        noise: at least 0, the same for both latents; 0 or None for none.
        renormalize: keep the norm of every sample.
        tie: keep x and y equal.
        generator: of the noise, on any device; None takes a seed from torch's own.
        progress: show a bar with the loss.
        state: of the result to go on from, which may come from a file (`OptimizeResult`); the
            sampler's chain and x's shape must be those that it was reached with. x then gives the
            shape, dtype and device alone, and the noise goes on where it stopped. `steps=3` and
            then `steps=2` are `steps=5` bit for bit, if loss_fn is deterministic.

    Returns:
        An `OptimizeResult`. When a loss, image, gradient or updated latent is not finite it holds
        the last latents whose loss was finite, says why in `message`, and warns; an interrupt
        (Ctrl-C) returns what the finished steps have reached.

    Raises:
        ValueError, TypeError: an argument, or what a function returns, breaks the rule that the
            message names.
        Exception: what eps_fn, decode_fn, loss_fn or saliency_fn raises. From the second step on
            the exception's attribute `result`, where it has none of its own, is the
            `OptimizeResult` of the steps done: `except MyError as error: error.result`.

    Source: Wallace et al., End-to-End Diffusion Latent Optimization Improves Classifier Guidance,
    ICCV 2023 (DOODL); Wang et al., Saliency Guided Optimization of Diffusion Latents, 2024 (SGOOL).

    Example:
        >>> import torch, dense_attn
        >>> alphas = torch.linspace(0.999, 0.01, 1000)
        >>> sampler = dense_attn.ReversibleSampler(alphas, [750, 500, 250])
        >>> x = torch.randn(1, 3, 8, 8)
        >>> def loss_fn(image): return (image - 0.5).square().sum()
        >>> result = dense_attn.optimize_latents(
        ...     sampler, lambda x, t: 0.1 * x, torch.tanh, loss_fn, x, steps=3, progress=False
        ... )
        >>> result.latents.shape, len(result.losses), result.message
        (torch.Size([1, 3, 8, 8]), 3, '')
    """
    for argument, value in (("renormalize", renormalize), ("tie", tie), ("progress", progress)):
        if not isinstance(value, bool):
            _checks.refuse(argument, "be True or False", repr(value), TypeError)
    loss = ImageLoss(sampler, eps_fn, decode_fn, loss_fn, saliency_fn, salient_weight, tie)
    update = _Update(clip, momentum, noise, renormalize)
    _check_latents(x)
    _check_steps(steps)
    with torch.inference_mode(False):  # gradients on, also where the caller has switched them off
        state, generator = _start(x, loss, generator, state)
        return _run(loss, update, state, generator, steps, progress)


class _Update:
    """One step on the latents: clipped gradient, momentum, noise, norm."""

    def __init__(
        self, clip: float | None, momentum: float | None, noise: float | None, renormalize: bool
    ) -> None:
        if clip is not None and not _number_or_none("clip", clip) > 0:
            _checks.refuse("clip", "be above 0 or None", clip)
        self.clip, self.renormalize = clip, renormalize
        self.momentum = _number_or_none("momentum", momentum)
        if not 0 <= self.momentum < 1:
            _checks.refuse("momentum", "be from 0 to 1, 1 excluded", momentum)
        self.noise = _number_or_none("noise", noise)
        if not self.noise >= 0:
            _checks.refuse("noise", "be at least 0", noise)

    def __call__(
        self, state: State, loss: float, gradients: list[Tensor], generator: torch.Generator
    ) -> State:
        """The state after a step; the one before it stays as it is."""
        x = state["latents"][0]
        shift = 0.0
        if self.noise:  # the same for both latents
            made = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
            shift = self.noise * made.to(x.device)
        latents, buffers = [], []
        for index, (x, gradient) in enumerate(zip(state["latents"], gradients)):
            limit = min(self.clip or math.inf, torch.finfo(x.dtype).max)
            buffer = gradient.clamp(-limit, limit)
            if state["momentum"]:
                buffer = self.momentum * state["momentum"][index] + buffer
            x = x + buffer + shift
            latents.append(latent_state.normalized(x, state["norms"]) if self.renormalize else x)
            buffers.append(buffer)
        return {
            "step": state["step"] + 1,
            "latents": latents,
            "momentum": buffers,
            "norms": state["norms"],
            "losses": [*state["losses"], loss],
            "generator": generator.get_state(),
            "generator_device": state["generator_device"],
            "sampler": state["sampler"],
            "previous": {**state, "previous": None},
        }


def _number_or_none(argument: str, value: object) -> float:
    """A number, 0 for None."""
    return 0.0 if value is None else _checks.number(argument, value, rule="be a number or None")


def _run(
    loss: ImageLoss,
    update: _Update,
    state: State,
    generator: torch.Generator,
    steps: int,
    progress: bool,
) -> OptimizeResult:
    losses, problem = state["losses"], ""
    with _progress.bar(steps, "latent optimisation", shown=progress) as advance:
        try:
            for _ in range(steps):
                value, gradients = loss(state["latents"])
                losses = [*state["losses"], value]
                for gradient in gradients:
                    require_finite("loss_fn must have finite gradients", gradient)
                updated = update(state, value, gradients, generator)
                for latent in updated["latents"]:
                    require_finite("the updated latents must be finite", latent)
                state = updated
                advance(loss=value)
        except NotFiniteError as error:
            if state["step"] == 0 and isinstance(error.__cause__, ValueError):  # x as it was given
                raise error.__cause__ from None
            problem = f"{error} at step {state['step']}"
            without_a_loss = len(losses) == state["step"]  # so these latents are not good
            if without_a_loss and state["previous"] is not None:
                state = state["previous"]
        except KeyboardInterrupt:
            problem = f"optimize_latents was interrupted in step {state['step']}"
            losses = state["losses"]
        except BaseException as error:  # SystemExit as well: how jobs are ended
            if state["step"]:
                _keep(error, state)
            raise
    if problem:
        problem += f"; returned the latents of step {state['step']}"
        warnings.warn(problem, stacklevel=3)
    return _result(state, losses, problem)


def _result(state: State, losses: list[float], message: str) -> OptimizeResult:
    latents = tuple(x.clone() for x in state["latents"])
    return OptimizeResult(latents if len(latents) > 1 else latents[0], list(losses), state, message)


def _keep(error: BaseException, state: State) -> None:
    """Hand out what the finished steps have reached with the exception that ends the run."""
    step = state["step"]
    stopped = f"optimize_latents was stopped by {type(error).__name__} in step {step}"
    with suppress(Exception):  # it may take no attributes, in any way; a device may be lost
        if not isinstance(getattr(error, "result", None), (OptimizeResult, NoneType)):
            return  # its own
        message = f"{stopped}; these are the latents of step {step}"
        error.result = _result(state, state["losses"], message)
        if hasattr(error, "add_note"):  # from Python 3.11
            note = "the steps before are this exception's `result`: `state=result.state` goes on"
            error.add_note(f"{stopped}; {note}")


def _start(
    x: Tensor, loss: ImageLoss, generator: torch.Generator | None, state: State | None
) -> tuple[State, torch.Generator]:
    """The state before the next step, and the generator of its noise."""
    if generator is not None and not isinstance(generator, torch.Generator):
        got = type(generator).__name__
        _checks.refuse("generator", "be a torch.Generator or None", got, TypeError)
    if state is not None:
        return latent_state.resumed(state, x, loss.sampler, loss.count, generator)
    return latent_state.first(x, loss.sampler, loss.count, generator)


def _check_latents(x: Tensor) -> None:
    _checks.floats("x", x)
    if x.dim() < 2 or x.numel() == 0:
        _checks.refuse("x", "have a batch dimension and others, none of them empty", tuple(x.shape))
    _checks.readable("x", x, "numbers")
    finite = x.isfinite()
    if not finite.all():
        _checks.refuse("x", "be finite", x[~finite][0].item())


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int):
        _checks.refuse("steps", "be an integer", repr(steps), TypeError)
    if steps < 0:
        _checks.refuse("steps", "be at least 0", steps)
