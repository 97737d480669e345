"""The loss of the images sampled from latents, as a whole and in their salient part, and its
gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.optimize.saliency import salient_crop
from dense_attn.reversible.sampler import ReversibleSampler

X_OFF_THE_GRID = "x must be finite"
OFF_THE_GRID = (X_OFF_THE_GRID, "y must be finite", "eps_fn's result must be finite")


class NotFiniteError(ArithmeticError):
    """Nothing to descend on from here; says what must be finite and what came instead."""


def require_finite(rule: str, value: Tensor) -> None:
    """Raise what stops the loop where a value is not finite."""
    finite = value.isfinite()
    if not finite.all():
        raise NotFiniteError(f"{rule}, got {value[~finite][0].item()}")


class ImageLoss:
    """The loss of the images sampled from latents, and its gradients."""

    def __init__(
        self,
        sampler: ReversibleSampler,
        eps_fn: Callable[[Tensor, object], Tensor],
        decode_fn: Callable[[Tensor], Tensor],
        loss_fn: Callable[[Tensor], Tensor],
        saliency_fn: Callable[[Tensor], Tensor] | None,
        salient_weight: float,
        tie: bool,
    ) -> None:
        if not isinstance(sampler, ReversibleSampler):
            _checks.refuse("sampler", "be a ReversibleSampler", type(sampler).__name__, TypeError)
        _callable("eps_fn", eps_fn)
        _callable("decode_fn", decode_fn)
        _callable("loss_fn", loss_fn)
        if saliency_fn is not None:
            _callable("saliency_fn", saliency_fn)
        self.sampler, self.decode_fn, self.loss_fn, self.saliency_fn = (
            sampler,
            decode_fn,
            loss_fn,
            saliency_fn,
        )
        self.salient_weight = _checks.number("salient_weight", salient_weight)
        self.eps_fn = lambda x, t: eps_fn(
            x, t
        )  # no module, so that no gradients of parameters are computed
        self.paired = sampler.method == "edict"  # two latents of one time
        self.count = 2 if self.paired and not tie else 1  # latents that are free

    def __call__(self, latents: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
        """The mean loss of the images, and the direction of steepest descent for each free
        latent.
        """
        leaves = [latents[0].detach().clone().requires_grad_()]
        if self.paired:
            leaves.append(latents[-1].detach().clone().requires_grad_())
        with _of_the_grid():
            sampled = self.sampler.sample(self.eps_fn, *leaves)[: len(leaves)]
        # Image by image: one decoder's activations at a time; no generator, which would lose a
        # StopIteration.
        losses, gradients = zip(*[self._of_image(one, leaves[0].dtype) for one in sampled])
        with _of_the_grid(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "eps_fn must be an nn.Module"
            )  # parameters are to get no gradient
            at_noise = torch.autograd.grad(sampled, leaves, gradients)
        if len(leaves) > self.count:
            at_noise = [(at_noise[0] + at_noise[1]) / 2]
        return sum(loss / len(losses) for loss in losses), [
            gradient / -len(leaves) for gradient in at_noise
        ]

    def _of_image(self, sampled: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        """The loss of one decoded latent and its gradient there."""
        leaf = sampled.detach().to(dtype).requires_grad_()
        image = self.decode_fn(leaf)
        if not isinstance(image, Tensor) or not image.requires_grad:
            rule = "return images, a tensor that depends on the latents"
            _checks.refuse("decode_fn", rule, _with_gradient(image))
        loss = self._checked_loss(image)
        if self.saliency_fn is not None:
            loss = loss + self.salient_weight * self._checked_loss(
                salient_crop(image, self._saliency(image))
            )
        value = loss.item()
        if not math.isfinite(value):
            raise NotFiniteError(f"loss_fn must return finite values, got {value}")
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if gradient is None:
            _checks.refuse(
                "loss_fn", "return a scalar tensor that depends on the image", "one that does not"
            )
        return value, gradient.to(sampled.dtype)

    def _checked_loss(self, image: Tensor) -> Tensor:
        loss = self.loss_fn(image)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            _checks.refuse(
                "loss_fn", "return a scalar tensor that depends on the image", _with_gradient(loss)
            )
        if loss.is_complex():
            _checks.refuse("loss_fn", "return a real number", _described(loss), TypeError)
        return loss.reshape(())

    def _saliency(self, image: Tensor) -> Tensor:
        """The map [B, H, W] of images in -1..1."""
        if image.dim() != 4:
            rule = "return images [batch, channels, height, width] for a saliency_fn"
            _checks.refuse("decode_fn", rule, _described(image))
        if image.numel() == 0 or image.is_complex():
            _checks.refuse(
                "decode_fn",
                "return real images, none of them empty, for a saliency_fn",
                _described(image),
            )
        seen = image.detach()
        require_finite("decode_fn must return finite images", seen)
        with torch.no_grad():
            saliency = self.saliency_fn((seen / 2 + 0.5).clamp(0, 1))
        batch, _, height, width = image.shape
        if not isinstance(saliency, Tensor) or saliency.shape != (batch, height, width):
            _checks.refuse(
                "saliency_fn",
                f"return a tensor of shape {(batch, height, width)}",
                _described(saliency),
            )
        if saliency.is_complex():
            _checks.refuse("saliency_fn", "return real numbers", _described(saliency), TypeError)
        if not saliency.isfinite().all():
            _checks.refuse(
                "saliency_fn", "return finite values", saliency[~saliency.isfinite()][0].item()
            )
        return saliency if saliency.is_floating_point() else saliency.float()


@contextmanager
def _of_the_grid() -> Iterator[None]:
    """What an exact sampler raises on NaN and overflow, as a NotFiniteError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not str(error).startswith(OFF_THE_GRID):
            raise
        raise NotFiniteError(str(error)) from error


def _callable(argument: str, value: object) -> None:
    if not callable(value):
        _checks.refuse(argument, "be callable", type(value).__name__, TypeError)


def _described(value: object) -> str:
    """What a function returned, in a few words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a {_checks.name(value.dtype)} tensor of shape {tuple(value.shape)}"


def _with_gradient(value: object) -> str:
    """The same where a gradient is asked for."""
    missing = isinstance(value, Tensor) and not value.requires_grad
    return _described(value) + (" without gradient" if missing else "")
