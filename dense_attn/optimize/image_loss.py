"""The loss of images sampled from latents, whole and in their salient part, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dense_attn import _checks
from dense_attn.optimize.saliency import salient_crop
from dense_attn.reversible import grid
from dense_attn.reversible.sampler import ReversibleSampler, sample_for_latents

_SCALAR = "return a scalar tensor that depends on the image"


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
        _checks.function("eps_fn", eps_fn)
        _checks.function("decode_fn", decode_fn)
        _checks.function("loss_fn", loss_fn)
        if saliency_fn is not None:
            _checks.function("saliency_fn", saliency_fn)
        self.sampler, self.eps_fn = sampler, eps_fn
        self.decode_fn, self.loss_fn, self.saliency_fn = decode_fn, loss_fn, saliency_fn
        self.salient_weight = _checks.number("salient_weight", salient_weight)
        self.paired = sampler.method == "edict"  # two latents of one time
        self.count = 2 if self.paired and not tie else 1  # latents that are free

    def __call__(self, latents: tuple[Tensor, ...]) -> tuple[float, list[Tensor]]:
        """The mean loss of the images, and the steepest descent of each free latent."""
        leaves = [latents[0].detach().clone().requires_grad_()]
        if self.paired:
            leaves.append(latents[-1].detach().clone().requires_grad_())
        with _of_the_grid():
            sampled = sample_for_latents(self.sampler, self.eps_fn, *leaves)[: len(leaves)]
        # One decoder's activations at a time; a list, as a generator would lose a StopIteration.
        losses, gradients = zip(*[self._of_image(one, leaves[0].dtype) for one in sampled])
        with _of_the_grid():
            at_noise = torch.autograd.grad(sampled, leaves, gradients)
        if len(leaves) > self.count:
            at_noise = [(at_noise[0] + at_noise[1]) / 2]
        descent = [gradient / -len(leaves) for gradient in at_noise]
        return sum(loss / len(losses) for loss in losses), descent

    def _of_image(self, sampled: Tensor, dtype: torch.dtype) -> tuple[float, Tensor]:
        """The loss of one decoded latent and its gradient there."""
        leaf = sampled.detach().to(dtype).requires_grad_()
        image = self.decode_fn(leaf)
        if not isinstance(image, Tensor) or not image.requires_grad:
            rule = "return images, a tensor that depends on the latents"
            _checks.refuse("decode_fn", rule, _with_gradient(image))
        loss = self._checked_loss(image)
        if self.saliency_fn is not None:
            crop = salient_crop(image, self._saliency(image))
            loss = loss + self.salient_weight * self._checked_loss(crop)
        value = loss.item()
        if not math.isfinite(value):
            raise NotFiniteError(f"loss_fn must return finite values, got {value}")
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        if gradient is None:
            _checks.refuse("loss_fn", _SCALAR, "one that does not")
        return value, gradient.to(sampled.dtype)

    def _checked_loss(self, image: Tensor) -> Tensor:
        loss = self.loss_fn(image)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
            _checks.refuse("loss_fn", _SCALAR, _with_gradient(loss))
        if loss.is_complex():
            _checks.refuse("loss_fn", "return a real number", _described(loss), TypeError)
        return loss.reshape(())

    def _saliency(self, image: Tensor) -> Tensor:
        """The map [B, H, W] of images in -1..1."""
        if image.dim() != 4:
            rule = "return images [batch, channels, height, width] for a saliency_fn"
            _checks.refuse("decode_fn", rule, _described(image))
        if image.numel() == 0 or image.is_complex():
            rule = "return real images, none of them empty, for a saliency_fn"
            _checks.refuse("decode_fn", rule, _described(image))
        seen = image.detach()
        require_finite("decode_fn must return finite images", seen)
        with torch.no_grad():
            saliency = self.saliency_fn((seen / 2 + 0.5).clamp(0, 1))
        batch, _, height, width = image.shape
        if not isinstance(saliency, Tensor) or saliency.shape != (batch, height, width):
            rule = f"return a tensor of shape {(batch, height, width)}"
            _checks.refuse("saliency_fn", rule, _described(saliency))
        if saliency.is_complex():
            _checks.refuse("saliency_fn", "return real numbers", _described(saliency), TypeError)
        finite = saliency.isfinite()
        if not finite.all():
            _checks.refuse("saliency_fn", "return finite values", saliency[~finite][0].item())
        return saliency if saliency.is_floating_point() else saliency.float()


@contextmanager
def _of_the_grid() -> Iterator[None]:
    """An exact sampler's refusal of NaN and overflow becomes a NotFiniteError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if not grid.left(error):
            raise
        raise NotFiniteError(str(error)) from error


def _described(value: object) -> str:
    """The kind, dtype and shape of a function's result, in a few words."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a {_checks.name(value.dtype)} tensor of shape {tuple(value.shape)}"


def _with_gradient(value: object) -> str:
    """A function's result in a few words, with its lack of a gradient."""
    missing = isinstance(value, Tensor) and not value.requires_grad
    return _described(value) + (" without gradient" if missing else "")
